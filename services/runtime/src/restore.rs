//! `create` of an armed container: `runc restore` in its place.

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use haulage_criu::cause::Cause;
use haulage_engine::armed::{Armed, ArmedRoot, Outcome, State};
use haulage_sys::Pid;
use haulage_sys::arp::announce_all;

use crate::RUNC;
use crate::args::{Create, global, has_global};
use crate::cgroup;
use crate::failure::Failure;
use crate::gate;
use crate::keeper::{Keeper, Kept, micros};
use crate::network::Network;
use crate::root;

/// What runc has CRIU call its log, in the working directory.
const RESTORE_LOG: &str = "restore.log";

/// Restores the container and records how that ended.
///
/// The state is consumed first: whatever happens from then on, it is not restored a second time.
///
/// # Errors
/// The container does not run. Unless the state could not even be consumed, the failure is recorded too.
pub(crate) fn restore(
    armed_root: &ArmedRoot,
    create: &Create<'_>,
    armed: &Armed,
    called: Instant,
) -> Result<(), Failure> {
    let arguments = arguments(create, armed)?;
    let bundle = create.options.iter().find(|(name, _)| *name == "bundle").map(|(_, path)| Path::new(path));
    let bundle = bundle.ok_or(Failure::Missing("bundle"))?;
    let mut network = armed.network_first.then(|| Network::make(bundle, create.id)).transpose()?;
    if armed.wait {
        cgroup::tell(bundle, create.id, has_global(create.globals, "systemd-cgroup"), &armed.work)?;
    }
    let made = called.elapsed();
    let restoring = Instant::now();
    // runc inherits our standard streams: they become the container's.
    let mut runc = Command::new(RUNC);
    runc.args(arguments);
    if armed.wait {
        let container_root = root::of(bundle).map_err(Failure::Root)?;
        gate::set_up(&mut runc, &armed.work, create.id, &container_root).map_err(Failure::Gate)?;
    } else {
        armed_root.consume(create.id)?;
    }
    let outcome = Outcome { prepare_us: micros(made), ..Outcome::default() };
    let (status, kept, mut outcome) = if armed.wait {
        if let Some(network) = &network {
            runc.env(gate::NETWORK, network.path());
        }
        let listener = armed_root.listen_at_gate(create.id)?;
        let keeper =
            Keeper { armed_root, id: create.id, armed, network: network.take(), outcome: outcome.clone() };
        let (status, kept) = std::thread::scope(|scope| {
            let kept = scope.spawn(|| keeper.keep(&listener));
            let status = runc.status();
            // A keeper to whom the gate has not come waits for it no more.
            drop(armed_root.connect_to_gate(create.id));
            (status, kept.join())
        });
        (status, kept.unwrap_or_else(|panic| std::panic::resume_unwind(panic)), outcome)
    } else {
        (runc.status(), Ok(Kept::Silent), outcome)
    };
    let succeeded = matches!(&status, Ok(status) if status.success());
    // What runs must not go on then.
    let kept = kept.map(|kept| if succeeded { kept } else { Kept::Silent });
    if matches!(armed_root.state(create.id), Ok(State::Armed(_))) {
        // The word has not come: nothing is restored, and nothing is used up. What runs all the same is not what was
        // to come.
        if succeeded {
            destroy(create);
        }
        return Err(match (kept, cause(create, armed)) {
            (Err(failure), _) => failure,
            (Ok(_), cause) if cause.errors.is_empty() => Failure::CalledOff(armed.migration.clone()),
            (Ok(_), cause) => Failure::Restore { migration: armed.migration.clone(), cause },
        });
    }
    // How long it took is worth no failure.
    let took = || armed_root.since_go(create.id).ok().flatten().unwrap_or_else(|| restoring.elapsed());
    let failure = match kept {
        Ok(Kept::Speaks(spoke, init)) if succeeded => {
            if let Some(init) = init {
                init.let_go();
            }
            // The network had been there, or has been made by runc, and was never silent.
            if spoke.start_us == 0 {
                announce(create, armed);
            }
            outcome = Outcome { exit_code: Some(0), ..spoke };
            outcome.start_us = if outcome.start_us == 0 { micros(took()) } else { outcome.start_us };
            // It is recorded as restored; this says only how long it took.
            let _ = armed_root.record_time(create.id, &outcome);
            return Ok(());
        }
        // Without a gate: a container that runs unknown to the restorer could run twice; until now nobody has heard
        // from it.
        Ok(_) if succeeded && !armed.wait => {
            let recorded =
                Outcome { ok: true, exit_code: Some(0), restore_us: micros(took()), ..outcome.clone() };
            let shown = armed_root.record(create.id, &recorded).map_err(Failure::Record);
            let shown = shown.and_then(|()| {
                network.map_or(Ok(()), |network| network.open(&armed.images, &armed.addresses).map(drop))
            });
            match shown {
                Ok(()) => {
                    announce(create, armed);
                    let _ =
                        armed_root.record_time(create.id, &Outcome { start_us: micros(took()), ..recorded });
                    return Ok(());
                }
                Err(failure) => failure,
            }
        }
        Err(failure) => failure,
        Ok(_) => match &status {
            Err(error) => Failure::Runc(std::io::Error::new(error.kind(), error.to_string())),
            Ok(_) => Failure::Restore { migration: armed.migration.clone(), cause: cause(create, armed) },
        },
    };
    // What may have come to life before it failed must not go on.
    destroy(create);
    outcome.exit_code = status.ok().and_then(|status| status.code());
    outcome.error = Some(failure.chain());
    // The reason of the failure matters more than that it could not be recorded: without a record it counts as failed.
    let _ = armed_root.record(create.id, &outcome);
    Err(failure)
}

/// Switches and neighbours still point at the old host. If they are not told they find the container when they ask
/// again, so this does not fail.
fn announce(create: &Create<'_>, armed: &Armed) {
    let file = create.options.iter().find(|(name, _)| *name == "pid-file");
    let pid = file.and_then(|(_, path)| std::fs::read_to_string(path).ok()?.trim().parse().ok());
    if let Some(pid) = pid.and_then(Pid::from_raw) {
        let _ = announce_all(pid, &armed.addresses);
    }
}

fn arguments(create: &Create<'_>, armed: &Armed) -> Result<Vec<OsString>, Failure> {
    let mut args: Vec<OsString> = create.globals.to_vec();
    args.extend(["restore", "--detach"].map(Into::into));
    for (name, value) in &create.options {
        match *name {
            "preserve-fds" if *value == "0" => {}
            "preserve-fds" | "pidfd-socket" => return Err(Failure::Unsupported(name)),
            _ => option(&mut args, name, value),
        }
    }
    if !create.options.iter().any(|(name, _)| *name == "bundle") {
        return Err(Failure::Missing("bundle"));
    }
    // no-new-keyring has no meaning for processes that exist.
    if create.flags.contains(&"no-pivot") {
        args.push("--no-pivot".into());
    }
    option(&mut args, "image-path", armed.images.as_os_str());
    option(&mut args, "work-path", armed.work.as_os_str());
    let choices = [
        (armed.lazy_pages, "--lazy-pages"),
        (armed.tcp_established, "--tcp-established"),
        (armed.file_locks, "--file-locks"),
        (armed.ext_unix_sk, "--ext-unix-sk"),
    ];
    args.extend(choices.iter().filter(|(chosen, _)| *chosen).map(|(_, flag)| flag.into()));
    args.push(create.id.into());
    Ok(args)
}

fn option(args: &mut Vec<OsString>, name: &str, value: &OsStr) {
    args.push(format!("--{name}").into());
    args.push(value.to_owned());
}

/// CRIU's reason, or where it never got that far, runc's.
fn cause(create: &Create<'_>, armed: &Armed) -> Cause {
    let cause = Cause::of_log(&armed.work.join(RESTORE_LOG), None);
    if !cause.errors.is_empty() {
        return cause;
    }
    let log = global(create.globals, "log").and_then(|path| std::fs::read_to_string(path).ok());
    Cause::of_errors(log.unwrap_or_default().lines().filter_map(runc_error))
}

/// The message of an error in runc's log, in its JSON form.
fn runc_error(line: &str) -> Option<String> {
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    if line.get("level")?.as_str()? == "error" { Some(line.get("msg")?.as_str()?.to_owned()) } else { None }
}

fn destroy(create: &Create<'_>) {
    let mut args = create.globals.to_vec();
    args.extend(["delete", "--force", create.id].map(Into::into));
    // The failure that is being reported says what matters; the engine deletes a container that it could not create.
    let _ = Command::new(RUNC).args(args).status();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Call, parse};

    fn built(line: &str) -> Result<String, Failure> {
        let args: Vec<OsString> = line.split_whitespace().map(Into::into).collect();
        let Call::Create(create) = parse(&args) else { panic!("{line}") };
        let args = arguments(&create, &Armed { lazy_pages: true, ..Armed::new("m", "/images", "/work") })?;
        Ok(args.join(OsStr::new(" ")).into_string().unwrap())
    }

    #[test]
    fn create_becomes_restore_with_all_that_it_was_given() {
        assert_eq!(
            built("--root /r --log /l create --bundle /b --pid-file /p --no-new-keyring abc").unwrap(),
            "--root /r --log /l restore --detach --bundle /b --pid-file /p --image-path /images --work-path /work \
             --lazy-pages --tcp-established --file-locks --ext-unix-sk abc"
        );
    }

    #[test]
    fn what_a_restore_cannot_do_is_refused() {
        assert!(matches!(
            built("create -b /b --preserve-fds 2 abc"),
            Err(Failure::Unsupported("preserve-fds"))
        ));
        assert!(built("create -b /b --preserve-fds 0 abc").is_ok());
        assert!(matches!(built("create --pid-file /p abc"), Err(Failure::Missing("bundle"))));
    }
}
