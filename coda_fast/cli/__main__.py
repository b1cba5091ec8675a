from coda_fast.cli import main

main()
