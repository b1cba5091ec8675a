import sys

from experiments.fast_training import main

sys.exit(main())
