"""Run copies of a command as jobs of Slurm and wait for them; recipes call this (cmd_backend)."""

import os

from espnet2.utils.types import str2bool

from espnet_llm_plugin import cluster
from espnet_llm_plugin.bin.data_options import new_parser
from espnet_llm_plugin.errors import run_cli


def get_parser():
    """The command line's options."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--cluster", choices=("slurm", "local"), default="slurm", help="Where to run"
    )
    parser.add_argument("--conf", default="conf/slurm.yaml", help="Options of the jobs")
    parser.add_argument("--kind", choices=cluster.KINDS, default="data", help="Its section")
    parser.add_argument("--nj", type=int, default=1, help="Number of jobs")
    parser.add_argument("--ngpu", type=int, default=0, help="GPUs of a node of a job")
    parser.add_argument("--num_nodes", type=int, default=1, help="Nodes of a job")
    parser.add_argument("--num_threads", type=int, default=1, help="CPUs of a job, at least")
    parser.add_argument("--log", required=True, help="Log of a job; @JOB@ is its number")
    parser.add_argument(
        "--append_log", type=str2bool, default=False, help="Keep what is in the logs"
    )
    parser.add_argument("command", nargs="+", help="After `--`: the command; @JOB@ is the number")
    return parser


def main(cmd=None):
    """Run the command line."""
    args = get_parser().parse_args(cmd)
    parameters = cluster.read_parameters(args.conf, args.kind)
    cluster.run_array(
        args.command,
        args.nj,
        args.log,
        append_log=args.append_log,
        cluster=args.cluster,
        parameters=cluster.with_resources(
            parameters, ngpu=args.ngpu, num_nodes=args.num_nodes, num_threads=args.num_threads
        ),
        directory=os.getcwd(),
    )


def cli() -> None:
    """Entry point of the console script."""
    run_cli(main)


if __name__ == "__main__":
    cli()
