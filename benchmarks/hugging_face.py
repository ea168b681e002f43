"""Conservation check of further Hugging Face models, without model-specific code.

``python -m benchmarks.hugging_face`` builds tiny random models from configurations, measures them under the default
composite, and writes the results as JSON and the second table of ``docs/attention.md``. No weights are downloaded. It
requires transformers, which ``make hugging-face`` installs.
"""

from __future__ import annotations

import argparse
import re
import warnings
from typing import Any

import torch
import transformers

from benchmarks import tables
from benchmarks.conservation import conservation_check, random_biases, store
from nrm_plugin import RelevanceMeasure
from nrm_plugin.errors import UnsupportedOperationError
from tests.hosts.further_models import FURTHER, INPUTS


def measured(name: str) -> dict[str, Any]:
    """Returns the results of the conservation check of one model, or the operation without a kernel."""
    row = FURTHER[name]
    torch.manual_seed(0)
    model = random_biases(getattr(transformers, row.kind)(getattr(transformers, row.config)(**row.options)))
    try:
        return conservation_check(RelevanceMeasure(model, INPUTS[row.inputs], row.target, output=row.output))
    except UnsupportedOperationError as error:
        return {"failed": re.sub(r"/\S*?/(?=transformers/)", "", str(error))[:160]}


def main() -> None:
    """Writes the results and the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = []
    for name in sorted(FURTHER, key=str.casefold):
        rows.append({"model": name, **measured(name)})
        print(rows[-1], flush=True)
    store("hugging_face", {"rows": rows}, "transformers")
    tables.write("hugging_face")


if __name__ == "__main__":
    main()
