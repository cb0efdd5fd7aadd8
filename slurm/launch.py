"""Submits one run to Slurm, or with --local runs it here.

    python slurm/launch.py --nodes 4 --gpus-per-node 8 --time 72h --partition X -- \
        recipes/snclr.py --arch vit_small --epochs 300 --data /path/to/imagenet

One task per GPU. Flags of the script are checked first; the job runs the present commit, whatever
the tree becomes later. At the time limit or a preemption the run saves, is requeued and continues.
The same command again continues a run that has ended otherwise.
"""

import subprocess
import sys

try:
    from common.errors import UserError, command
    from slurm.ledger import Job, check_name
    from slurm.resources import (
        OneLineParser,
        add_common_flags,
        add_resource_flags,
        check_time,
        cluster_layer,
        flags_layer,
        resources_of,
    )
    from slurm.submission import REPOSITORY, check_flags, script_path, submit
except ModuleNotFoundError as error:  # the system's python, say
    sys.exit(
        f"error: no module {error.name}: activate the environment first, `. .venv/bin/activate` in "
        "the checkout (make demo or make test makes it)"
    )


def main(argv: list[str] | None = None) -> int:
    """Returns exit code 0: submitted, or under --local finished; 75: stopped under --local."""
    argv = sys.argv[1:] if argv is None else argv
    parser = OneLineParser(
        description=__doc__.split("\n")[0],
        usage="python slurm/launch.py [flags] -- script.py [flags of the script]",
        allow_abbrev=False,
    )
    parser.add_argument("--name", help="of the job (default <recipe>-<dataset>-<arch>-<seed>)")
    add_common_flags(parser)
    add_resource_flags(parser)
    own, dashes, script = split(argv)
    arguments = parser.parse_args(own)
    if not dashes or not script:
        raise UserError("no script: after the job's flags give -- script.py and its own flags")
    path = script_path(script[0])
    if {"--help", "-h"} & {*script[1:]}:
        return subprocess.run([sys.executable, str(REPOSITORY / path), *script[1:]]).returncode
    resources = resources_of(cluster_layer(arguments.cluster), flags_layer(arguments))
    if resources.time or not arguments.local:
        check_time(resources)
    job = Job("", path, script[1:])
    facts = check_flags([job], resources.ranks)[0]
    default = facts.get("name") or path.removesuffix("/run.py").removesuffix(".py")
    job.name = check_name(arguments.name or default.replace("/", "-"))
    return submit(job.name, [job], resources, arguments)


def split(argv: list[str]) -> tuple[list[str], bool, list[str]]:
    """Returns what comes before the first --, whether there is one, and what comes after it."""
    if "--" not in argv:
        return [*argv], False, []
    middle = argv.index("--")
    return argv[:middle], True, argv[middle + 1 :]


if __name__ == "__main__":
    codes: list[int] = []
    sys.exit(command(lambda: codes.append(main())) or codes[0])
