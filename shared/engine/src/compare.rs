//! Whether a container made from a spec is the same container.

use std::fmt;

use serde_json::Value;

use crate::spec::{ContainerSpec, MountSpec, NetworkSpec, VolumeSpec};

/// One respect in which two containers differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Where, as a JSON pointer into the spec.
    pub at: String,
    /// What the source has there, as JSON.
    pub source: String,
    /// What the target has there, as JSON.
    pub target: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} became {}", self.at, self.source, self.target)
    }
}

/// Which differences are meant to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Created and perhaps running, its restart policy still "no".
    Created,
    /// Handed over to the engine for good.
    Adopted,
}

/// All respects in which `target` is not what `source` was.
///
/// Not differences: what belongs to one engine (ids, paths, names of anonymous volumes), the OCI runtime, addresses
/// that became explicit, and the many ways in which Docker writes "nothing".
pub fn compare(source: &ContainerSpec, target: &ContainerSpec, stage: Stage) -> Vec<Difference> {
    let mut found = Found(Vec::new());
    found.check("/name", &source.name, &target.name);
    found.check("/image/id", &source.image.id, &target.image.id);
    for (key, value) in &source.config {
        match key.as_str() {
            // Checked with the networks.
            "MacAddress" => {}
            "Image" if target.image.reference == target.image.id => {}
            _ => found.json(&format!("/config/{key}"), value, target.config.get(key)),
        }
    }
    for (key, value) in target.config.iter().filter(|(key, _)| !source.config.contains_key(*key)) {
        if key != "MacAddress" {
            found.json(&format!("/config/{key}"), &Value::Null, Some(value));
        }
    }
    for (key, value) in &source.host_config {
        let theirs = target.host_config.get(key);
        match key.as_str() {
            "Runtime" => {}
            "RestartPolicy" if stage == Stage::Created => {}
            "RestartPolicy" if source.restart_policy().is_never() && target.restart_policy().is_never() => {}
            _ => found.json(&format!("/host_config/{key}"), value, theirs),
        }
    }
    for (key, value) in target.host_config.iter().filter(|(key, _)| !source.host_config.contains_key(*key)) {
        found.json(&format!("/host_config/{key}"), &Value::Null, Some(value));
    }
    pair(
        &source.mounts,
        &target.mounts,
        |m| m.destination.display().to_string(),
        |at, a, b| {
            found.mount(&format!("/mounts/{at}"), a, b);
        },
    );
    pair(
        &source.networks,
        &target.networks,
        |n| n.name.clone(),
        |at, a, b| {
            found.network(&format!("/networks/{at}"), a, b);
        },
    );
    // The engine's own profile is given at the start; one that was asked for is in the host configuration too.
    if target.apparmor.is_some() {
        found.check("/apparmor", &source.apparmor, &target.apparmor);
    }
    found.0
}

struct Found(Vec<Difference>);

impl Found {
    fn check<T: PartialEq + fmt::Debug>(&mut self, at: &str, source: &T, target: &T) {
        if source != target {
            let (source, target) = (format!("{source:?}"), format!("{target:?}"));
            self.0.push(Difference { at: at.to_owned(), source, target });
        }
    }

    fn json(&mut self, at: &str, source: &Value, target: Option<&Value>) {
        let target = target.unwrap_or(&Value::Null);
        if !same(source, target) {
            let (source, target) = (source.to_string(), target.to_string());
            self.0.push(Difference { at: at.to_owned(), source, target });
        }
    }

    fn mount(&mut self, at: &str, source: Option<&MountSpec>, target: Option<&MountSpec>) {
        let (Some(source), Some(target)) = (source, target) else {
            return self.check(at, &source.is_some(), &target.is_some());
        };
        self.check(&format!("{at}/kind"), &source.kind, &target.kind);
        self.check(&format!("{at}/writable"), &source.writable, &target.writable);
        self.check(&format!("{at}/propagation"), &source.propagation, &target.propagation);
        if source.volume.is_none() {
            self.check(&format!("{at}/source"), &source.source, &target.source);
        }
        let portable = |volume: &Option<VolumeSpec>| {
            volume.clone().map(|mut volume| {
                if volume.anonymous {
                    volume.name.clear();
                }
                volume
            })
        };
        self.check(&format!("{at}/volume"), &portable(&source.volume), &portable(&target.volume));
    }

    fn network(&mut self, at: &str, source: Option<&NetworkSpec>, target: Option<&NetworkSpec>) {
        let (Some(source), Some(target)) = (source, target) else {
            return self.check(at, &source.is_some(), &target.is_some());
        };
        self.check(&format!("{at}/driver"), &source.driver, &target.driver);
        self.check(&format!("{at}/ipv4"), &source.ipv4, &target.ipv4);
        self.check(&format!("{at}/ipv6"), &source.ipv6, &target.ipv6);
        // A created container may not have its MAC address yet.
        if let (Some(source), Some(target)) = (&source.mac, &target.mac) {
            self.check(&format!("{at}/mac"), &source.to_lowercase(), &target.to_lowercase());
        }
        self.check(&format!("{at}/aliases"), &source.aliases, &target.aliases);
        self.check(&format!("{at}/links"), &source.links, &target.links);
        self.check(&format!("{at}/driver_opts"), &source.driver_opts, &target.driver_opts);
    }
}

/// Brings together the items of both lists that have the same key.
fn pair<'a, T>(
    source: &'a [T],
    target: &'a [T],
    key: impl Fn(&T) -> String,
    mut visit: impl FnMut(&str, Option<&'a T>, Option<&'a T>),
) {
    for item in source {
        let name = key(item);
        visit(&name, Some(item), target.iter().find(|other| key(other) == name));
    }
    for item in target {
        let name = key(item);
        if !source.iter().any(|other| key(other) == name) {
            visit(&name, None, Some(item));
        }
    }
}

/// Equal, or both one of Docker's ways to write "nothing", at every level.
fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            a.iter().all(|(key, value)| same(value, b.get(key).unwrap_or(&Value::Null)))
                && b.iter().all(|(key, value)| a.contains_key(key) || is_nothing(value))
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        _ => a == b || (is_nothing(a) && is_nothing(b)),
    }
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}
