"""What is bundled to try qmica with: an almanac to learn, questions about it, and general text.

The almanac and its questions are invented (`scripts/make_almanac.py` writes them); samples/README.md says where the
general texts are from. The text that forgetting is measured on and the text that is replayed against it have
different authors.
"""

from pathlib import Path

_HOME = Path(__file__).parent / "samples"

ALMANAC = (str(_HOME / "almanac.jsonl"),)
QUESTIONS = _HOME / "almanac-questions.jsonl"
GENERAL = (str(_HOME / "workshop.txt"),)
REPLAY = (str(_HOME / "wonderland.txt"),)
