"""The examples at the end of each help page. Each line can be copied; a test checks that each one parses."""

from __future__ import annotations

START = """
spqr quantize demo --out small --nsamples 16 --seqlen 1024   # compress
spqr generate small --chat --prompt 'Why is the sky blue?'   # ask
spqr perplexity small --windows 10                           # measure
"""
"""A first session, at the end of ``spqr --help``."""

EXAMPLES = {
    "quantize": """
        # Compress a small model to 4.3 bits per weight, with little calibration text
        spqr quantize demo --out small --nsamples 16 --seqlen 1024

        # Compress a model of your own further, then train scales and outliers
        spqr quantize ./my-model --out my-3bit --preset 3bit --tune logits

        # Calibrate on two texts: two windows of code for each window of WikiText-2
        spqr quantize demo --out code --calib wikitext2 --calib code.jsonl=2

        # Another method, to compare with
        spqr quantize demo --out gptq --method gptq --bits 4 --group-size 64
        """,
    "perplexity": """
        # On 10 windows of 2048 tokens of WikiText-2
        spqr perplexity small --data wikitext2 --windows 10

        # On a text of your own, compared with the dense model
        spqr perplexity small --data my-text.txt --against demo
        """,
    "compare": """
        # The dense model comes first, then the quantized one
        spqr compare demo small --data wikitext2 --windows 10

        # Keep the result for 'spqr report'
        spqr compare demo small --data pydoc --seqlen 1024 --json small.json
        """,
    "eval": """
        # The SpQR paper's five tasks, 200 questions each, against the dense model
        spqr eval small --tasks paper --limit 200 --compare demo

        # Go on with a run that was stopped
        spqr eval small --tasks paper --resume

        # Two tasks from the Hugging Face hub, with 5 solved examples each
        spqr eval small --tasks piqa,arc_easy --num-fewshot 5 --json scores.json
        """,
    "bench": """
        # Tokens per second of a quantized model
        spqr bench small

        # Compared with the dense model, in turns
        spqr bench small --dense demo --prompt-tokens 256 --new-tokens 128
        """,
    "analyze": """
        # Analyze a quantized model; open analysis/report.html afterwards
        spqr analyze small --out analysis

        # Draw the weights of two blocks of a dense model, as if rounded to 4 bits
        spqr analyze demo --out demo-analysis --bits 4 --maps 'layers\\.[01]\\.'
        """,
    "report": """
        # One page about two models
        spqr report small gptq --out models.html

        # With an analysis and measured results
        spqr report analysis small --results small.json --out small.html
        """,
    "generate": """
        # Ask one question
        spqr generate small --chat --prompt 'Why is the sky blue?'

        # Have a conversation; an empty line or Ctrl-D ends it
        spqr generate small --chat

        # Continue a text, with random sampling
        spqr generate small --prompt 'Once upon a time' --temperature 0.8 --seed 1
        """,
    "inspect": """
        # Show bits, outliers and errors of each weight
        spqr inspect small

        # The same as JSON
        spqr inspect small --json small.json
        """,
    "export": """
        # A dense model in float16 that any program can load
        spqr export small --out small-dense

        # The format that transformers runs as SpQR, from a model made with --bits 3
        spqr export three --out my-spqr --format hf-spqr --push you/my-spqr
        """,
    "import": """
        # The second folder holds the original model's config.json and tokenizer
        spqr import saved-by-spqr --base ./llama-7b --out llama-spqr

        # Add outliers to the dense weights, as the original converter does
        spqr import saved-by-spqr --base ./llama-7b --out llama-spqr --outliers added
        """,
}
"""By command."""
