//! Strangers talk nonsense, to NATS and to the bulk ports: they are refused with a code, and nothing comes of it.

use anyhow::{Context, Result, ensure};
use haulage_protocol::checkpointer::{Commit, Freeze, Network, RollBack};
use haulage_protocol::id::{Epoch, HostId, MigrationId, Step};
use haulage_protocol::page_shipper::{ClosePages, OpenPages, RunRound};
use haulage_protocol::restorer::{Create, Restore, Undo};
use haulage_protocol::rpc::{Command, Rpc};
use haulage_protocol::secret::Token;
use haulage_protocol::subject::{EVENTS_FILTER, JOBS_FILTER, Subject};
use haulage_protocol::syncer::{CloseFiles, OpenFiles};
use haulage_protocol::unit::Bytes;
use haulage_protocol::version::Version;
use haulage_tests::fleet::Fleet;
use haulage_tests::resp::Client;
use haulage_tests::scenario::{Redis, nothing_left_on, only_on, system};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

/// How long a phase or an answer may be in coming.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a migration may take that strangers have disturbed.
const DISTURBED: Duration = Duration::from_secs(60);

/// A command to one service: where it goes, and what it says.
struct Asked {
    subject: String,
    command: Value,
}

impl Asked {
    /// A command that the service would obey: of the migration that is under way, and later than all of its own.
    fn new<R: Rpc>(host: &HostId, migration: &MigrationId, body: R) -> Result<Self> {
        let (version, step) = (Version::CURRENT, Step(1_000_000));
        let command =
            Command { version, migration: migration.clone(), epoch: Epoch(1_000), step, floor: step, body };
        let subject = Subject::command::<R>(host).to_string();
        Ok(Self { subject, command: serde_json::to_value(command)? })
    }

    /// Sends something in its place and fails unless it is refused with this code.
    fn refused(&self, fleet: &Fleet, instead: &[u8], code: &str) -> Result<()> {
        let answer = fleet.nats()?.request(&self.subject, instead, PATIENCE)?;
        let (kind, why) = (answer.pointer("/answer"), answer.pointer("/fault/code"));
        ensure!(
            kind == Some(&Value::from("failed")) && why == Some(&Value::from(code)),
            "{} answered {:?} with {answer}, not with {code}",
            self.subject,
            String::from_utf8_lossy(instead)
        );
        Ok(())
    }
}

/// Each of these would wreck the migration that is under way, were it obeyed.
#[test]
fn commands_that_cannot_be_understood_are_answered_with_a_fault_and_change_nothing() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        Client::connect(redis.server())?.fill(128)?;
        let container = fleet.host(0).docker(&["inspect", "--format", "{{.Id}}", "web"])?.parse()?;
        let container = move || -> haulage_protocol::id::ContainerId { Clone::clone(&container) };
        let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
        let migration = fleet.start_migration("web", 0, 1)?;
        let id = migration_of(&events.next(PATIENCE)?)?;
        events.wait_for_phase("files", PATIENCE)?;

        let (a, b): (HostId, HostId) = (fleet.host(0).name().parse()?, fleet.host(1).name().parse()?);
        let open = || OpenPages { token: Token::generate(), memory: Bytes(0) };
        let commands = [
            Asked::new(&a, &id, Freeze { container: container(), spec: None, network: Network::AtRestore })?,
            Asked::new(&a, &id, Commit { container: container() })?,
            Asked::new(&a, &id, RollBack { container: container() })?,
            Asked::new(&a, &id, RunRound::default())?,
            Asked::new(&a, &id, CloseFiles {})?,
            Asked::new(&b, &id, open())?,
            Asked::new(&b, &id, ClosePages {})?,
            Asked::new(
                &b,
                &id,
                OpenFiles { token: Token::generate(), roots: Vec::new(), tmpfs: Vec::new() },
            )?,
            Asked::new(&b, &id, Create { spec: Value::Null, memory: Bytes(0), images: None })?,
            Asked::new(
                &b,
                &id,
                Restore { container: container(), store: "/".to_owned(), tmpfs: Vec::new() },
            )?,
            Asked::new(&b, &id, Undo {})?,
        ];
        for asked in &commands {
            let mut foreign = asked.command.clone();
            *foreign.get_mut("version").context("a command without a version")? = json!(99);
            asked.refused(fleet, &serde_json::to_vec(&foreign)?, "foreign_version")?;
            let mut maimed = asked.command.clone();
            maimed.as_object_mut().context("a command")?.remove("migration");
            for malformed in [serde_json::to_vec(&maimed)?, b"{".to_vec(), b"\xff\x00".to_vec(), Vec::new()] {
                asked.refused(fleet, &malformed, "malformed_message")?;
            }
        }
        migration.wait(DISTURBED)?.committed()?;
        redis.carries_on()?;
        only_on(fleet, "web", 1)?;
        fleet.hosts().iter().try_for_each(nothing_left_on)?;
        redis.finish().map(drop)
    })
}

fn migration_of(event: &Value) -> Result<MigrationId> {
    let id = event.get("migration").and_then(Value::as_str).context("an event without its migration")?;
    Ok(id.parse()?)
}

/// The bulk ports of the target are known to everybody; what is said there without the token is refused, and does not
/// disturb the migration whose sessions are open.
#[test]
fn intruders_on_the_bulk_ports_are_refused_while_a_migration_goes_on() -> Result<()> {
    system(&Fleet::builder(), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        Client::connect(redis.server())?.fill(128)?;
        let target = fleet.host(1).name();
        let (pages, files) = (bulk_address(fleet, target, "pages")?, bulk_address(fleet, target, "files")?);
        let mut events = fleet.nats()?.subscribe(EVENTS_FILTER)?;
        let migration = fleet.start_migration("web", 0, 1)?;
        let id = migration_of(&events.next(PATIENCE)?)?;
        // From here on both sessions are open, and until the end.
        events.wait_for_phase("files", PATIENCE)?;
        for (address, role) in [(&pages, "pages"), (&files, "files")] {
            let (greeting, stranger) = (greeting(&id, role)?, greeting(&MigrationId::generate(), role)?);
            refusal(address, &greeting, "wrong_token").with_context(|| format!("{role} at {address}"))?;
            refusal(address, &stranger, "unknown_session").with_context(|| format!("{role} at {address}"))?;
            let cuts = [1, HEADER_BYTES - 1, HEADER_BYTES, greeting.len() - 1];
            for cut in cuts.into_iter().filter_map(|length| greeting.get(..length)) {
                refusal(address, cut, "truncated").with_context(|| format!("{role} at {address}"))?;
            }
            let mut damaged = greeting.clone();
            *damaged.last_mut().context("an empty greeting")? ^= 1;
            refusal(address, &damaged, "checksum_mismatch")
                .with_context(|| format!("{role} at {address}"))?;
        }
        migration.wait(DISTURBED)?.committed()?;
        redis.carries_on()?;
        only_on(fleet, "web", 1)?;
        fleet.hosts().iter().try_for_each(nothing_left_on)?;
        redis.finish().map(drop)
    })
}

fn bulk_address(fleet: &Fleet, host: &str, fact: &str) -> Result<String> {
    let hosts = fleet.haul(&["hosts", "--json"])?.json()?;
    let services = hosts.get(host).and_then(Value::as_array).with_context(|| format!("no host {host}"))?;
    let address = services.iter().find_map(|service| service.get("facts")?.get(fact)?.as_str());
    address.map(str::to_owned).with_context(|| format!("{host} does not tell its address for {fact}"))
}

/// Of a frame: `shared/transport/src/stream/frame.rs` has the layout.
const HEADER_BYTES: usize = 16;
const HELLO: u16 = 1;
const REFUSED: u16 = 3;

/// A whole greeting with a token that nobody gave out.
fn greeting(migration: &MigrationId, role: &str) -> Result<Vec<u8>> {
    let body = json!({ "session": { "migration": migration, "role": role }, "token": Token::generate() });
    let payload = [&1_u16.to_le_bytes()[..], &serde_json::to_vec(&body)?].concat();
    let length = u32::try_from(payload.len())?.to_le_bytes();
    let checked = [&HELLO.to_le_bytes()[..], &[0, 0], &length].concat();
    let checksum = crc32fast::hash(&[&checked[..], &payload].concat()).to_le_bytes();
    Ok([&b"HAUL"[..], &checked, &checksum, &payload].concat())
}

/// Says `words`, and no more, and fails unless they are refused with this code.
fn refusal(address: &str, words: &[u8], code: &str) -> Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(words)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let (header, payload) = answer.split_at_checked(HEADER_BYTES).context("no whole frame for an answer")?;
    ensure!(header.get(4..6) == Some(&REFUSED.to_le_bytes()[..]), "not refused: {header:?}");
    let refusal: Value = serde_json::from_slice(payload)?;
    ensure!(refusal.get("code") == Some(&Value::from(code)), "refused with {refusal}, not with {code}");
    Ok(())
}

#[test]
fn strangers_and_damage_are_refused_and_harm_nothing() -> Result<()> {
    system(&Fleet::builder().hosts(3).without_images(2), |fleet| {
        let redis = Redis::start(fleet, 0, "web", 0, &[])?;
        for nonsense in [&b"{}"[..], b"{\"version\":99}", b"\xff\x00", b""] {
            fleet.nats()?.publish(JOBS_FILTER, nonsense)?;
        }
        let hosts = fleet.haul(&["hosts", "--json"])?.json()?;
        for (host, services) in hosts.as_object().context("hosts")? {
            let facts = services.as_array().into_iter().flatten().filter_map(|service| service.get("facts"));
            for fact in facts.flat_map(|facts| [facts.get("pages"), facts.get("files")]).flatten() {
                let address = fact.as_str().context("a bulk address")?;
                babble_at(address).with_context(|| format!("{host} at {address}"))?;
            }
        }
        fleet.migrate("web", 0, 1)?.committed()?;
        redis.carries_on()?;
        damage_the_largest_object(&fleet.directory().join("bucket"), fleet, &redis)?;
        redis.carries_on()?;
        only_on(fleet, "web", 1)?;
        fleet.hosts().iter().try_for_each(nothing_left_on)?;
        redis.finish().map(drop)
    })
}

/// Garbage, and a beginning that never goes on: both connections are closed by the listener, which lives.
fn babble_at(address: &str) -> Result<()> {
    for nonsense in [&b"GET / HTTP/1.1\r\n\r\n and so on, longer than any header could be"[..], b"HAUL"] {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(nonsense)?;
        let mut answer = Vec::new();
        // A reset is as good an end as a close.
        if let Err(error) = stream.read_to_end(&mut answer) {
            ensure!(error.kind() == std::io::ErrorKind::ConnectionReset, "not closed: {error}");
        }
    }
    Ok(())
}

/// The image reaches a host that lacks it through the bucket; an object that was changed there must not.
fn damage_the_largest_object(bucket: &std::path::Path, fleet: &Fleet, redis: &Redis) -> Result<()> {
    // Puts the image into the bucket: nothing else has needed it there yet.
    let first = fleet.migrate("web", 1, 2)?;
    first.committed()?;
    redis.carries_on()?;
    let back = fleet.migrate("web", 2, 1)?;
    back.committed()?;
    fleet.host(2).docker(&["image", "rm", "--force", haulage_tests::image::REDIS])?;
    let mut objects: Vec<_> = walk(&bucket.join("sha256"))?;
    objects.sort_by_key(|(_, size)| *size);
    let (largest, _) = objects.pop().context("an empty bucket")?;
    let mut content = std::fs::read(&largest)?;
    let middle = content.len() / 2;
    *content.get_mut(middle).context("an empty object")? ^= 1;
    std::fs::write(&largest, content)?;
    let moved = fleet.migrate("web", 1, 2)?;
    ensure!(moved.code == "digest_mismatch" && !moved.remedy.is_empty(), "not refused: {}", moved.result);
    Ok(())
}

fn walk(dir: &std::path::Path) -> Result<Vec<(std::path::PathBuf, u64)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            found.extend(walk(&entry.path())?);
        } else {
            found.push((entry.path(), metadata.len()));
        }
    }
    Ok(found)
}
