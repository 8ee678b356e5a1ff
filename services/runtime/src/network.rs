//! The container's network, made before the container is there.
//!
//! The engine's hooks take most of the time of a start. They need no more than a network namespace with a process in
//! it, so they are run on an empty one beforehand, and the bundle then names that namespace in their place.
//! Until the container is restored the namespace is silent: its address still answers on the source host, and a packet
//! that came here by mistake would be answered by a reset, since there is no socket yet.

use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use haulage_criu::packets;
use haulage_criu::quiet::{self, Change};
use haulage_sys::arp::announce_in;
use haulage_sys::netns::NetworkNamespace;
use haulage_sys::packet::Capture;
use serde_json::{Map, Value, json};

use crate::failure::Failure;

/// Hooks that runc runs on a namespace that it has made, before the container's own program is there.
const HOOKS: [&str; 2] = ["prestart", "createRuntime"];
/// Before the engine configures the namespace: no interface of it may speak of itself, as IPv6 does when it comes up.
/// The engine enables again what the container shall have.
const NO_IPV6: [&str; 2] =
    ["/proc/sys/net/ipv6/conf/default/disable_ipv6", "/proc/sys/net/ipv6/conf/all/disable_ipv6"];

/// A network namespace that is configured and silent.
pub(crate) struct Network {
    namespace: NetworkNamespace,
    arp_ignore: String,
    /// Lets packets out, until it has.
    to_send: Option<Change>,
    to_hear: Change,
    /// Packets that arrive, once they shall come here.
    capture: Option<Capture>,
}

impl Network {
    /// Makes the network of the container `id` whose bundle is in `bundle`, and has the bundle name it.
    ///
    /// # Errors
    /// [`Failure::Network`]; the bundle is then not to be used.
    pub(crate) fn make(bundle: &Path, id: &str) -> Result<Self, Failure> {
        let path = bundle.join("config.json");
        let mut config: Value =
            serde_json::from_slice(&fs::read(&path).map_err(network)?).map_err(network)?;
        let (namespace, occupant) = NetworkNamespace::create().map_err(network)?;
        let arp_ignore =
            namespace.run(|| silence_ipv6().and_then(|()| read_arp_ignore())).map_err(network)?;
        let arp_ignore = arp_ignore.map_err(network)?;
        let silence = Change::to_silence(&namespace).map_err(network)?;
        quiet::hush(&namespace, silence).map_err(network)?;
        let state = json!({
            "ociVersion": config.get("ociVersion").cloned().unwrap_or_default(),
            "id": id,
            "status": "creating",
            "pid": occupant.id().as_raw_nonzero().get(),
            "bundle": bundle,
        });
        for hook in take_hooks(&mut config) {
            run_hook(&hook, &state)?;
        }
        namespace.run(|| apply_sysctls(&config)).map_err(network)??;
        name_namespace(&mut config, &namespace.path())?;
        fs::write(&path, config.to_string()).map_err(network)?;
        // As a sysctl of the container's may have set it.
        let arp_ignore =
            sysctl(&config, "net.ipv4.conf.all.arp_ignore").map_or(arp_ignore, ToOwned::to_owned);
        let to_send = Some(Change::to_send(&namespace).map_err(network)?);
        let to_hear = Change::to_hear(&namespace).map_err(network)?;
        Ok(Self { namespace, arp_ignore, to_send, to_hear, capture: None })
    }

    /// A path under which any process with the right to can open it, for as long as this exists.
    pub(crate) fn path(&self) -> PathBuf {
        self.namespace.path()
    }

    /// The container stands still on its source: its packets shall come here, where they are kept. It is asked for by
    /// ARP and answers, but nothing gets further.
    ///
    /// # Errors
    /// [`Failure::Network`]; the packets may go either way then.
    pub(crate) fn take(&mut self, addresses: &[(String, Ipv4Addr)]) -> Result<(), Failure> {
        self.capture = Some(self.namespace.run(Capture::begin).map_err(network)?.map_err(network)?);
        quiet::answer(&self.namespace, &self.arp_ignore).map_err(network)?;
        announce_in(&self.namespace, addresses).map(drop).map_err(network)
    }

    /// It is no longer answered to ARP: the container may go on where it was.
    ///
    /// # Errors
    /// [`Failure::Network`].
    pub(crate) fn stop_answering(&self) -> Result<(), Failure> {
        quiet::never_answer(&self.namespace).map_err(network)
    }

    /// The container is about to be restored: what its connections have to send gets out, and nothing in.
    ///
    /// # Errors
    /// [`Failure::Network`]: it may be silent for ever.
    pub(crate) fn send(&mut self) -> Result<(), Failure> {
        self.to_send.take().map_or(Ok(()), quiet::send).map_err(network)
    }

    /// The container is there: its network speaks, and what was kept for it, beside its images in `images` or here,
    /// arrives. How many packets that were, and why others were lost.
    ///
    /// # Errors
    /// [`Failure::Network`]: it may be silent for ever.
    pub(crate) fn open(
        mut self,
        images: &Path,
        addresses: &[(String, Ipv4Addr)],
    ) -> Result<(u32, Option<std::io::Error>), Failure> {
        self.send()?;
        quiet::hear(&self.namespace, self.to_hear, &self.arp_ignore).map_err(network)?;
        // What is lost is sent again, later than it could be.
        let here = || self.capture.as_ref().map(packets::drain).transpose();
        let kept = packets::read(images).and_then(|there| Ok([there, here()?.unwrap_or_default()].concat()));
        let put = kept.and_then(|kept| {
            self.namespace.run(|| packets::put_back(&kept))??;
            Ok(u32::try_from(kept.len()).unwrap_or(u32::MAX))
        });
        // Switches and neighbours may still point at the old host. If they are not told they find the container when
        // they ask again.
        let announced = announce_in(&self.namespace, addresses).map(drop);
        match put {
            Ok(count) => Ok((count, announced.err())),
            Err(error) => Ok((0, Some(error))),
        }
    }
}

fn network(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Failure {
    Failure::Network(error.into())
}

fn silence_ipv6() -> std::io::Result<()> {
    NO_IPV6.iter().filter(|path| Path::new(path).exists()).try_for_each(|path| fs::write(path, "1"))
}

fn read_arp_ignore() -> std::io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/net/ipv4/conf/all/arp_ignore")?.trim().to_owned())
}

/// The hooks that make the network, in their order, which the bundle then has no more.
fn take_hooks(config: &mut Value) -> Vec<Value> {
    let Some(hooks) = config.get_mut("hooks").and_then(Value::as_object_mut) else { return Vec::new() };
    let taken = HOOKS.iter().filter_map(|kind| hooks.remove(*kind));
    taken.filter_map(|hooks| hooks.as_array().cloned()).flatten().collect()
}

/// Runs one hook as the OCI runtime specification has it: the container's state on its standard input.
fn run_hook(hook: &Value, state: &Value) -> Result<(), Failure> {
    let path = hook.get("path").and_then(Value::as_str).ok_or_else(|| network("a hook without a path"))?;
    let texts =
        |name: &str| hook.get(name).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    let mut command = Command::new(path);
    let mut args = texts("args");
    if let Some(name) = args.next() {
        // Docker's hook tells by its name what it is to do.
        std::os::unix::process::CommandExt::arg0(&mut command, name);
    }
    command.args(args).env_clear().envs(texts("env").filter_map(|pair| pair.split_once('=')));
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(network)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook that does not want it may have closed its end.
        let _ = stdin.write_all(state.to_string().as_bytes());
    }
    let output = child.wait_with_output().map_err(network)?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(network(format!("hook {path} ended with {}: {said}", output.status)))
}

fn sysctls(config: &Value) -> Option<&Map<String, Value>> {
    config.get("linux")?.get("sysctl")?.as_object()
}

fn sysctl<'a>(config: &'a Value, name: &str) -> Option<&'a str> {
    sysctls(config)?.get(name)?.as_str()
}

/// The container's settings of its network, which the runtime would make in a namespace of its own.
fn apply_sysctls(config: &Value) -> Result<(), Failure> {
    let of_network = sysctls(config).into_iter().flatten().filter(|(name, _)| name.starts_with("net."));
    for (name, value) in of_network {
        // It stays silent for now.
        if name == "net.ipv4.conf.all.arp_ignore" {
            continue;
        }
        let path = format!("/proc/sys/{}", name.replace('.', "/"));
        fs::write(&path, value.as_str().unwrap_or_default()).map_err(network)?;
    }
    Ok(())
}

fn name_namespace(config: &mut Value, path: &Path) -> Result<(), Failure> {
    let namespaces = config.get_mut("linux").and_then(|linux| linux.get_mut("namespaces"));
    let mut namespaces = namespaces.and_then(Value::as_array_mut).into_iter().flatten();
    let ours = namespaces.find(|namespace| namespace.get("type").and_then(Value::as_str) == Some("network"));
    match ours.and_then(Value::as_object_mut) {
        Some(namespace) => {
            namespace.insert("path".to_owned(), json!(path));
            Ok(())
        }
        None => Err(network("the bundle has no network namespace")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(config: &Value) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        dir
    }

    #[test]
    fn hooks_run_on_the_namespace_and_the_bundle_names_it() {
        let out = tempfile::tempdir().unwrap();
        let seen = out.path().join("seen");
        let script = format!(
            "pid=$(sed 's/.*\"pid\":\\([0-9]*\\).*/\\1/'); readlink /proc/$pid/ns/net > {0}; echo $NAME >> {0}",
            seen.display()
        );
        let hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["NAME=value", "PATH=/usr/bin:/bin"] });
        let dir = bundle(&json!({
            "ociVersion": "1.0.2",
            "hooks": { "prestart": [hook], "poststop": [] },
            "linux": {
                "namespaces": [{ "type": "pid" }, { "type": "network" }],
                "sysctl": { "net.ipv4.ip_default_ttl": "77", "kernel.msgmax": "1" },
            },
        }));
        let network = Network::make(dir.path(), "abc").unwrap();
        let config: Value =
            serde_json::from_slice(&fs::read(dir.path().join("config.json")).unwrap()).unwrap();
        assert_eq!(config["hooks"], json!({ "poststop": [] }));
        let named = config["linux"]["namespaces"][1]["path"].as_str().unwrap();
        let made = fs::read_link(named).unwrap();
        assert_eq!(fs::read_to_string(&seen).unwrap(), format!("{}\nvalue\n", made.display()));
        let read =
            |path: &'static str| network.namespace.run(move || fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(read("/proc/sys/net/ipv4/ip_default_ttl"), "77\n");
        assert_eq!(read("/proc/sys/net/ipv4/conf/all/arp_ignore"), "8\n", "it is silent");
        network.open(dir.path(), &[]).unwrap();
    }

    #[test]
    fn a_hook_that_fails_is_an_error_with_its_words() {
        let hook = json!({ "path": "/bin/sh", "args": ["sh", "-c", "echo no such network >&2; exit 3"] });
        let dir = bundle(
            &json!({ "hooks": { "createRuntime": [hook] }, "linux": { "namespaces": [{ "type": "network" }] } }),
        );
        let Err(failure) = Network::make(dir.path(), "abc") else { panic!("it was made") };
        assert!(failure.chain().contains("no such network"), "{}", failure.chain());
    }

    #[test]
    fn a_bundle_without_a_network_of_its_own_is_refused() {
        let dir = bundle(&json!({ "linux": { "namespaces": [{ "type": "pid" }] } }));
        assert!(Network::make(dir.path(), "abc").is_err());
    }
}
