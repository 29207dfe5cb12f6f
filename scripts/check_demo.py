"""Assert what the demo's run learnt and forgot, and say it in a sentence.

    python scripts/check_demo.py runs/demo

Reads eval.json (`qmica eval --gguf FILE --json`) and answer.txt (what llama.cpp said) from the run folder; exits with 1
where the accuracy on the almanac's questions rose by less than GAIN, in transformers or in llama.cpp, or the perplexity
of the general text by more than WORSE. The one answer is shown and not judged: of 20 such the merged file knows 12 to
15, and which ones differs with the CPU's arithmetic.
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
    base, tuned, merged = json.loads(said[said.index("{") :])["scores"]
    gains = [row["accuracy"] - base["accuracy"] for row in (tuned, merged)]
    worse = tuned["perplexity"] / base["perplexity"]
    answer = (run / "answer.txt").read_text(encoding="utf-8").rpartition("Answer:\n")[2].strip().partition("\n")[0]
    print(
        f"\nlearnt: accuracy {base['accuracy']:.3f} -> {tuned['accuracy']:.3f} ({gains[0]:+.3f}, wanted +{GAIN}), "
        f"{merged['name']} in llama.cpp {merged['accuracy']:.3f} ({gains[1]:+.3f}); "
        f"forgot: perplexity {base['perplexity']:.1f} -> {tuned['perplexity']:.1f} (x {worse:.3f}, allowed {WORSE}); "
        f"asked what Ellowick exports it says {answer!r} (the almanac: {ANSWER!r})"
    )
    if min(gains) < GAIN or worse > WORSE:
        sys.exit("the demo did not learn what it should have")


if __name__ == "__main__":
    main()
