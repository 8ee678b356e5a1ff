//! The test images, made on this machine without any registry.
//!
//! All are in one archive as `docker load` reads it, built by hand: its content decides the image ids, so that every
//! host of every fleet has the same ones, as if pulled from a registry.

use crate::bench::writer;
use crate::dirtier;
use crate::host::Host;
use crate::process::{finish, run};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Redis on top of busybox. Its command is a server without persistence that listens on 6379.
pub const REDIS: &str = "haul-test/redis";
/// A shell and its tools.
pub const BUSYBOX: &str = "haul-test/busybox";
/// The self-checking programs of [`mod@dirtier`] on top of busybox.
pub const DIRTIER: &str = "haul-test/dirtier";
/// The benchmarks' workload of [`mod@writer`] on top of busybox.
pub const WRITER: &str = "haul-test/writer";

/// What `deploy/setup` has unpacked.
const REDIS_ROOT: &str = "/opt/haulage/images/redis";
const BUSYBOX_PROGRAM: &str = "/bin/busybox";

/// Where the archive is kept between runs, next to the programs.
fn cache() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let target = own.ancestors().find(|path| path.file_name().is_some_and(|name| name == "target"));
    Ok(target.unwrap_or_else(|| Path::new("/var/tmp/haulage-cache")).join("fleet-images"))
}

/// The archive of all test images, made if it is not there or older than what it is made from.
///
/// # Errors
/// `deploy/setup` has not been run, or a part could not be built.
pub fn archive() -> Result<PathBuf> {
    if !Path::new(REDIS_ROOT).join("bin/redis-server").exists() {
        bail!("{REDIS_ROOT} is missing: run deploy/setup");
    }
    let cache = cache()?;
    let recipe = recipe()?;
    let archive = cache.join(format!("images-{recipe}.tar"));
    if archive.exists() {
        return Ok(archive);
    }
    // Several test processes may come here at once: each builds its own, and the last rename wins.
    let work = cache.join(format!("building-{}", std::process::id()));
    fs::create_dir_all(&work).with_context(|| format!("make {}", work.display()))?;
    let built = build(&work, &archive);
    fs::remove_dir_all(&work)?;
    built.context("build the test images").map(|()| archive)
}

/// Names what the archive is made from, so that a change of it makes another archive.
fn recipe() -> Result<String> {
    let mut hash = Sha256::new();
    for text in
        [include_str!("image.rs"), dirtier::SOURCE, dirtier::HARDSHIP, dirtier::SEGMENTS, writer::SOURCE]
    {
        hash.update(text);
    }
    for program in [BUSYBOX_PROGRAM, &format!("{REDIS_ROOT}/bin/redis-server")] {
        let about = fs::metadata(program).with_context(|| format!("{program}: run deploy/setup"))?;
        hash.update(format!("{program} {} {:?}", about.len(), about.modified()?));
    }
    Ok(hex(&hash.finalize()).chars().take(16).collect())
}

fn build(work: &Path, archive: &Path) -> Result<()> {
    let busybox = work.join("busybox-root");
    for directory in ["bin", "etc", "tmp", "data", "proc", "sys", "dev"] {
        fs::create_dir_all(busybox.join(directory))?;
    }
    fs::copy(BUSYBOX_PROGRAM, busybox.join("bin/busybox"))?;
    for applet in run("busybox", &["--list"])?.lines().filter(|name| *name != "busybox") {
        symlink("busybox", busybox.join("bin").join(applet))?;
    }
    fs::write(busybox.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\nuser:x:999:999::/data:/bin/sh\n")?;
    fs::write(busybox.join("etc/group"), "root:x:0:\nuser:x:999:\n")?;
    run("chmod", &[Path::new("1777"), &busybox.join("tmp"), &busybox.join("data")])?;

    let dirtier_root = work.join("dirtier-root");
    fs::create_dir_all(dirtier_root.join("bin"))?;
    dirtier::compile(dirtier::SOURCE, &dirtier_root.join("bin/dirtier"))?;
    dirtier::compile(dirtier::HARDSHIP, &dirtier_root.join("bin/hardship"))?;
    dirtier::compile(dirtier::SEGMENTS, &dirtier_root.join("bin/segments"))?;
    let writer_root = work.join("writer-root");
    fs::create_dir_all(writer_root.join("bin"))?;
    dirtier::compile(writer::SOURCE, &writer_root.join("bin/writer"))?;

    let out = work.join("archive");
    fs::create_dir_all(&out)?;
    let base = Layer::pack(&out, "busybox", &busybox)?;
    let redis = Layer::pack(&out, "redis", Path::new(REDIS_ROOT))?;
    let dirtier = Layer::pack(&out, "dirtier", &dirtier_root)?;
    let writer = Layer::pack(&out, "writer", &writer_root)?;
    let redis_command =
        ["redis-server", "--save", "", "--appendonly", "no", "--protected-mode", "no", "--bind", "0.0.0.0"];
    let manifest = [
        image(&out, BUSYBOX, &[&base], &["sh"])?,
        image(&out, REDIS, &[&base, &redis], &redis_command)?,
        image(&out, DIRTIER, &[&base, &dirtier], &["dirtier"])?,
        image(&out, WRITER, &[&base, &writer], &["writer"])?,
    ];
    fs::write(out.join("manifest.json"), serde_json::to_vec(&manifest)?)?;
    let packed = work.join("images.tar");
    finish(Command::new("tar").arg("-cf").arg(&packed).arg("-C").arg(&out).arg("."))?;
    fs::rename(&packed, archive)?;
    Ok(())
}

/// A layer in the archive.
struct Layer {
    file: String,
    digest: String,
}

impl Layer {
    /// Packs a directory so that the same content always gives the same bytes.
    fn pack(out: &Path, name: &str, root: &Path) -> Result<Self> {
        let file = format!("{name}.tar");
        finish(
            Command::new("tar")
                .args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "-cf"])
                .arg(out.join(&file))
                .arg("-C")
                .arg(root)
                .arg("."),
        )?;
        let digest = digest_of(&out.join(&file))?;
        Ok(Self { file, digest })
    }
}

/// Writes an image's configuration and gives its entry in the archive's manifest.
fn image(out: &Path, name: &str, layers: &[&Layer], command: &[&str]) -> Result<Value> {
    let digests: Vec<String> = layers.iter().map(|layer| format!("sha256:{}", layer.digest)).collect();
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": { "Cmd": command, "Env": ["PATH=/bin"], "WorkingDir": "/data" },
        "rootfs": { "type": "layers", "diff_ids": digests },
    });
    let bytes = serde_json::to_vec(&config)?;
    let file = format!("{}.json", hex(&Sha256::digest(&bytes)));
    fs::write(out.join(&file), bytes)?;
    let files: Vec<&str> = layers.iter().map(|layer| layer.file.as_str()).collect();
    Ok(json!({ "Config": file, "RepoTags": [format!("{name}:latest")], "Layers": files }))
}

fn digest_of(path: &Path) -> Result<String> {
    let mut file = fs::File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer)?;
        let Some(part) = buffer.get(..count).filter(|part| !part.is_empty()) else { break };
        hash.update(part);
    }
    Ok(hex(&hash.finalize()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Loads all images of an archive into a host's engine.
pub(crate) fn load(host: &Host, archive: &Path) -> Result<()> {
    let archive = archive.to_str().context("the archive's path is not UTF-8")?;
    host.docker(&["load", "--quiet", "--input", archive]).map(drop)
}
