//! The command line.

use clap::{Parser, Subcommand};
use haulage_protocol::id::{HostId, MigrationId};

const EXAMPLES: &str = "\
Examples:
  haul hosts                                  which hosts there are
  haul migrate web-1 --to host-b              move a container and watch
  haul migrate web-1 --to host-b --detach     move it in the background
  haul migrate web-1 --to host-b --json       move it, one JSON object at the end
  haul ls                                     migrations, newest last
  haul show 0199c0ffee                        phases, rounds and downtime of one
  haul cancel 0199c0ffee                      undo one that is under way

Exit codes:
  0  done; with `migrate`, the container runs on the target
  1  refused or rolled back: the container runs where it was, the error says why
  2  wrong command line
  3  NATS cannot be reached, or the answer is not known: see `haul show`";

/// Moves running Docker containers between hosts without stopping their work.
#[derive(Debug, Parser)]
#[command(name = "haul", version, about, after_help = EXAMPLES, arg_required_else_help = true)]
pub(crate) struct Args {
    /// The NATS server.
    #[arg(
        long,
        env = "HAUL_NATS",
        default_value = "nats://127.0.0.1:4222",
        value_name = "URL",
        global = true
    )]
    pub(crate) nats: String,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Move a running container to another host.
    Migrate(Migrate),
    /// List migrations.
    Ls(Json),
    /// Show one migration: phases, rounds, downtime, outcome.
    Show(Show),
    /// Follow the events of one migration, or of all.
    Watch(Watch),
    /// Undo a migration that is under way. The container goes on where it was.
    Cancel(Cancel),
    /// List the hosts and their services.
    Hosts(Json),
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  haul migrate web-1 --to host-b
  haul migrate web-1 --from host-a --to host-b --max-downtime 50
  haul migrate web-1 --to host-b --shared /mnt/nfs     a bind mount that both hosts have")]
pub(crate) struct Migrate {
    /// The container: its name, its id, or a unique beginning of its id.
    pub(crate) container: String,
    /// The host it shall run on.
    #[arg(long, value_name = "HOST")]
    pub(crate) to: HostId,
    /// The host it runs on; needed only when several have a container of that name.
    #[arg(long, value_name = "HOST")]
    pub(crate) from: Option<HostId>,
    /// Pre-copy until sending the rest is predicted to take no longer than this. The fixed cost of a switch
    /// comes on top.
    #[arg(long, value_name = "MS", default_value = "150")]
    pub(crate) max_downtime: u64,
    /// The most pre-copy rounds.
    #[arg(long, value_name = "N", default_value = "8")]
    pub(crate) max_rounds: u32,
    /// A bind mount (its path on the hosts) that is the same on both hosts. May be given several times.
    #[arg(long, value_name = "PATH")]
    pub(crate) shared: Vec<String>,
    /// The id of the migration; the same id twice is one migration.
    #[arg(long, value_name = "ID")]
    pub(crate) id: Option<MigrationId>,
    /// Stay until it is over (the default).
    #[arg(long, conflicts_with = "detach")]
    pub(crate) wait: bool,
    /// Print the migration's id and leave.
    #[arg(long)]
    pub(crate) detach: bool,
    /// Print one JSON object: the record at the end, or the id with --detach.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Json {
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Show {
    /// The migration's id, or a unique beginning of it.
    pub(crate) id: String,
    /// Print the record as JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Watch {
    /// The migration's id, or a unique beginning of it; all migrations from now on when absent.
    pub(crate) id: Option<String>,
    /// Print each event as a JSON line.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Cancel {
    /// The migration's id, or a unique beginning of it.
    pub(crate) id: String,
    /// Let the source go on without the target's word, although the target was asked to restore. Only when you know
    /// that the container does not run there and the host is off or cut off for good: otherwise it runs twice. What
    /// the host has of it is removed when its services are back.
    #[arg(long)]
    pub(crate) target_is_dead: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn a_host_that_is_no_id_is_refused() {
        assert!(Args::try_parse_from(["haul", "migrate", "web", "--to", "host.b"]).is_err());
        assert!(Args::try_parse_from(["haul", "migrate", "web", "--to", "b", "--wait", "--detach"]).is_err());
        assert!(Args::try_parse_from(["haul", "migrate", "web", "--to", "b"]).is_ok());
    }
}
