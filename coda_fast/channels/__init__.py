"""Which channels of a stem make a decision of a hybrid network, and which pictures excite these channels."""

from coda_fast.channels.contributions import Leading, Term, leading
from coda_fast.channels.figure import channel_figure
from coda_fast.channels.pictures import Strongest, stem_of, strongest

__all__ = ["Leading", "Strongest", "Term", "channel_figure", "leading", "stem_of", "strongest"]
