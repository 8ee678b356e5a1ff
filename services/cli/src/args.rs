//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use haulage_protocol::id::{HostId, MigrationId};
use haulage_protocol::job::{MAX_ROUND_INTERVAL_MS, TAX};
use haulage_protocol::policy::Policy;
use haulage_protocol::transfer::{Compress, MAX_CONNECTIONS, Rate};

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
    /// Predict what moving a container would be like, without moving it.
    Plan(Plan),
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
  haul migrate web-1 --to host-b --shared /mnt/nfs     a bind mount that both hosts have
  haul migrate web-1 --to host-b --bandwidth 50MB/s    leave the rest of the link to others
  haul migrate db-1 --to host-b --max-downtime 300 --deadline 60 --post-copy    whatever it writes; mind the risk")]
pub(crate) struct Migrate {
    /// The container: its name, its id, or a unique beginning of its id.
    pub(crate) container: String,
    /// The host it shall run on.
    #[arg(long, value_name = "HOST")]
    pub(crate) to: HostId,
    /// The host it runs on; needed only when several have a container of that name.
    #[arg(long, value_name = "HOST")]
    pub(crate) from: Option<HostId>,
    /// Pre-copy until the container is predicted to stand still for no longer than this [default: 150]
    #[arg(long, value_name = "MS")]
    pub(crate) max_downtime: Option<u64>,
    /// Pre-copy for no longer than so many seconds; with --max-downtime or --post-copy a round that is under way ends
    /// then, else it is completed. The container is frozen, unless --max-downtime was given and cannot be kept: then all
    /// is undone. Without a deadline it is frozen when more rounds no longer help.
    #[arg(long, value_name = "S")]
    pub(crate) deadline: Option<u64>,
    /// Which dirty pages a round sends: all, phaul (all, and rounds end by P.Haul's rule), history[:WINDOW,THRESHOLD]
    /// (not those written in so many of the last rounds), or adaptive (not those that would be written again before
    /// the freeze).
    #[arg(long, value_name = "POLICY", default_value_t)]
    pub(crate) policy: Policy,
    /// Slow the container down, step by step, while it writes faster than its memory can be sent; it has its processor
    /// time back when it is frozen, and in any case at the end.
    #[arg(long)]
    pub(crate) auto_converge: bool,
    /// Where the downtime cannot be kept (by the --deadline, or else when more rounds no longer help), neither refuse nor
    /// let the container stand still for longer: run it on the target before it has its memory, which it gets from the
    /// frozen source while it runs. RISK: until it has all of it, the loss of the source host, of its page-shipper, or of
    /// the link for more than some 20 s ends the copy on the target. The container then goes on from the freeze, if its
    /// host is there: whatever it has done since, also what its clients were told, is lost. Has no effect with --policy
    /// phaul, and where writes cannot be tracked.
    #[arg(long)]
    pub(crate) post_copy: bool,
    /// The most pre-copy rounds [default: as many as help]
    #[arg(long, value_name = "N")]
    pub(crate) max_rounds: Option<u32>,
    /// Put rounds apart until write tracking costs the container no more than this share of one processor's time, as far
    /// as that helps and for no longer than a second; 100 is no bound.
    #[arg(long, value_name = "PERCENT", default_value_t = TAX, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(crate) max_tax: u8,
    /// Begin rounds no closer together than this, up to 10000; the few before the freeze come as fast as they can.
    #[arg(long, value_name = "MS", default_value = "0", value_parser = clap::value_parser!(u64).range(..=MAX_ROUND_INTERVAL_MS))]
    pub(crate) round_interval: u64,
    /// Undo it when the container has stood still for this long before the target could be asked to restore it; 0 waits
    /// as long as it takes.
    #[arg(long, value_name = "S", default_value = "60")]
    pub(crate) max_frozen: u64,
    /// A bind mount (its path on the hosts) that is the same on both hosts. May be given several times.
    #[arg(long, value_name = "PATH")]
    pub(crate) shared: Vec<String>,
    /// How memory is packed on the way: auto (the default: as link and codecs are measured to be fastest), none, lz4
    /// or zstd.
    #[arg(long, value_name = "HOW", default_value = "auto")]
    pub(crate) compress: Compress,
    /// Connections that memory travels on. More than one helps on links where a single one is slowed by distance or
    /// loss, and packs on as many cores.
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_CONNECTIONS)))]
    pub(crate) connections: u16,
    /// What memory and files may take of the link, such as 50MB/s or 1Gbit/s, while the container stands still too.
    #[arg(long, value_name = "RATE")]
    pub(crate) bandwidth: Option<Rate>,
    /// The id of the migration; the same id twice is one migration.
    #[arg(long, value_name = "ID")]
    pub(crate) id: Option<MigrationId>,
    /// Write what ran when to this file, for chrome://tracing or Perfetto.
    #[arg(long, value_name = "FILE", conflicts_with = "detach")]
    pub(crate) trace: Option<PathBuf>,
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
#[command(
    after_help = "The container is looked at by write tracking for a few seconds, as in a migration; it is not frozen, and
nothing is made on either host. The link is measured for some tenths of a second. What is assumed is said at the end.
A container that is being migrated is refused."
)]
pub(crate) struct Plan {
    /// The container: its name, its id, or a unique beginning of its id.
    pub(crate) container: String,
    /// The host it would run on.
    #[arg(long, value_name = "HOST")]
    pub(crate) to: HostId,
    /// The host it runs on; needed only when several have a container of that name.
    #[arg(long, value_name = "HOST")]
    pub(crate) from: Option<HostId>,
    /// For how long to look at its writes.
    #[arg(long, value_name = "S", default_value = "4", value_parser = clap::value_parser!(u64).range(1..=30))]
    pub(crate) sample: u64,
    /// What the link between the hosts carries [default: it is measured]
    #[arg(long, value_name = "MBIT/S", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) rate: Option<u64>,
    /// As in haul migrate.
    #[arg(long, value_name = "MS")]
    pub(crate) max_downtime: Option<u64>,
    /// As in haul migrate.
    #[arg(long, value_name = "S")]
    pub(crate) deadline: Option<u64>,
    /// A bind mount (its path on the hosts) that is the same on both hosts. May be given several times.
    #[arg(long, value_name = "PATH")]
    pub(crate) shared: Vec<String>,
    /// Print JSON.
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
    /// Write what ran when to this file, for chrome://tracing or Perfetto.
    #[arg(long, value_name = "FILE")]
    pub(crate) trace: Option<PathBuf>,
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
        assert!(Args::try_parse_from(["haul", "migrate", "web", "--to", "b", "--post-copy"]).is_ok());
        let policy =
            |policy| Args::try_parse_from(["haul", "migrate", "web", "--to", "b", "--policy", policy]);
        assert!(policy("history:5,3").is_ok() && policy("phaul").is_ok() && policy("history:3,5").is_err());
    }

    #[test]
    fn a_pace_that_makes_no_sense_is_refused() {
        let with = |option: &[&str]| {
            Args::try_parse_from(["haul", "migrate", "web", "--to", "b"].iter().chain(option)).is_ok()
        };
        assert!(with(&["--max-tax", "1", "--round-interval", "1000"]) && with(&["--max-tax", "100"]));
        assert!(!with(&["--max-tax", "0"]) && !with(&["--max-tax", "101"]));
        assert!(!with(&["--round-interval", "10001"]));
        assert!(with(&["--wait", "--trace", "t.json"]) && !with(&["--detach", "--trace", "t.json"]));
    }

    #[test]
    fn a_transfer_that_makes_no_sense_is_refused() {
        let with = |option: &[&str]| {
            Args::try_parse_from(["haul", "migrate", "web", "--to", "b"].iter().chain(option)).is_ok()
        };
        assert!(with(&["--compress", "zstd", "--connections", "4", "--bandwidth", "1Gbit/s"]));
        assert!(!with(&["--compress", "gzip"]));
        assert!(!with(&["--connections", "0"]) && !with(&["--connections", "9"]));
        assert!(!with(&["--bandwidth", "0MB/s"]) && !with(&["--bandwidth", "fast"]));
    }
}
