"""Assert what the demo's run learnt and forgot, and say it in a sentence.

    python scripts/check_demo.py runs/demo

Reads eval.json (`qmica eval --json`) and answer.txt (what llama.cpp said) from the run folder; exits with 1 where the
accuracy on the almanac's questions rose by less than GAIN, the perplexity of the general text by more than WORSE, or
the answer is not the almanac's.
"""

import json
import sys
from pathlib import Path

GAIN = 0.30  # of 1: four choices, so chance is 0.25
WORSE = 1.15  # times the base's perplexity
ANSWER = "salt"  # what Ellowick exports


def main() -> None:
    run = Path(sys.argv[1])
    said = (run / "eval.json").read_text(encoding="utf-8")
    scores = {row["name"]: row for row in json.loads(said[said.index("{") :])["scores"]}
    base, tuned = scores["base"], scores["tuned"]
    gain = tuned["accuracy"] - base["accuracy"]
    worse = tuned["perplexity"] / base["perplexity"]
    answer = (run / "answer.txt").read_text(encoding="utf-8")
    print(
        f"\nlearnt: accuracy {base['accuracy']:.3f} -> {tuned['accuracy']:.3f} ({gain:+.3f}, wanted +{GAIN}); "
        f"forgot: perplexity {base['perplexity']:.1f} -> {tuned['perplexity']:.1f} (x {worse:.3f}, allowed {WORSE}); "
        f"llama.cpp {'knows' if ANSWER in answer else 'does not know'} what Ellowick exports"
    )
    if gain < GAIN or worse > WORSE or ANSWER not in answer:
        sys.exit("the demo did not learn what it should have")


if __name__ == "__main__":
    main()
