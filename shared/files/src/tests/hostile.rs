//! Frames from a peer that is broken or means harm.

use std::fs;
use std::os::unix::fs::symlink;

use super::*;
use crate::wire::{Begin, Blob, FrameWriter, PassId, Record, Totals, VERSION};
use crate::{FilesError, Kind, Meta, Time};

fn meta() -> Meta {
    Meta { mode: 0o777, uid: 0, gid: 0, mtime: Time { seconds: 1, nanos: 2 }, xattrs: Vec::new() }
}

fn pass_id() -> PassId {
    PassId::from(Time { seconds: 5, nanos: 5 })
}

fn begin() -> Begin {
    Begin { version: VERSION, root: id(), pass: pass_id(), base: None, only: None }
}

fn path(text: &str) -> RelPath {
    RelPath::new(text).unwrap()
}

fn frame(records: &[Record<'_>]) -> Vec<u8> {
    let mut writer = FrameWriter::default();
    for record in records {
        assert!(writer.push(record).unwrap().is_none());
    }
    writer.take().to_vec()
}

/// What comes of these records after a beginning; the error that they end in.
fn refused(pair: &Pair, records: &[Record<'_>]) -> FilesError {
    let mut applier = Applier::new(pair.targets.clone());
    applier.feed(&frame(&[Record::Begin(begin())])).unwrap();
    let error = applier.feed(&frame(records)).unwrap_err();
    // The pass is lost: what would go on with it finds none.
    assert!(applier.feed(&frame(&[Record::End(Default::default())])).is_err());
    assert_eq!(pair.targets.holds(&id()), None);
    error
}

fn file(at: &str, size: u64, patch: bool) -> Record<'static> {
    Record::File { path: path(at), size, patch }
}

#[test]
fn nothing_is_reached_through_a_symbolic_link() {
    let pair = Pair::new();
    let outside = pair.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    write(&outside.join("treasure"), "gold");
    let link = || Record::Special {
        path: path("way-out"),
        kind: Kind::Symlink { target: outside.as_os_str().as_encoded_bytes().to_vec() },
        meta: meta(),
    };
    let to_file = || Record::Special {
        path: path("alias"),
        kind: Kind::Symlink { target: b"../outside/treasure".to_vec() },
        meta: meta(),
    };
    let special = |at: &str| Record::Special { path: path(at), kind: Kind::Fifo, meta: meta() };
    let attempts: Vec<Vec<Record<'_>>> = vec![
        vec![link(), file("way-out/evil", 0, false)],
        vec![link(), file("way-out/treasure", 0, true)],
        vec![link(), Record::MakeDir(path("way-out/evil"))],
        vec![link(), special("way-out/evil")],
        vec![link(), Record::Remove(path("way-out/treasure"))],
        vec![link(), Record::Link { path: path("stolen"), to: path("way-out/treasure") }],
        vec![link(), Record::DirMeta { path: path("way-out"), meta: meta() }],
        vec![to_file(), file("alias", 0, true)],
        vec![to_file(), Record::DirMeta { path: path("alias"), meta: meta() }],
    ];
    let before = fs::metadata(&outside).unwrap().permissions();
    let file_before = fs::metadata(outside.join("treasure")).unwrap().permissions();
    for records in attempts {
        assert_eq!(refused(&pair, &records).code(), "file_io", "{records:?}");
        assert_eq!(fs::read(outside.join("treasure")).unwrap(), b"gold", "{records:?}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "{records:?}");
        assert_eq!(fs::metadata(&outside).unwrap().permissions(), before);
        assert_eq!(fs::metadata(outside.join("treasure")).unwrap().permissions(), file_before);
    }
    // A whole file in a link's place replaces the link, not what it points to.
    let mut applier = Applier::new(pair.targets.clone());
    applier.feed(&frame(&[Record::Begin(begin()), to_file(), file("alias", 0, false)])).unwrap();
    assert_eq!(fs::read(outside.join("treasure")).unwrap(), b"gold");
}

#[test]
fn a_first_pass_does_not_empty_what_links_point_to() {
    let mut pair = Pair::new();
    let outside = pair.dir.path().join("outside");
    fs::create_dir(&outside).unwrap();
    write(&outside.join("treasure"), "gold");
    fs::create_dir(pair.to("dir")).unwrap();
    symlink(&outside, pair.to("dir/way-out")).unwrap();
    symlink(&outside, pair.to("way-out")).unwrap();
    pair.pass();
    pair.assert_same();
    assert_eq!(fs::read(outside.join("treasure")).unwrap(), b"gold");
}

#[test]
fn paths_that_lead_out_do_not_even_decode() {
    let pair = Pair::new();
    for bad in ["../evil", "/etc/evil", "a/../../evil", "a//b", "."] {
        let mut bytes = postcard::to_stdvec(&1_u8).unwrap();
        bytes.extend(postcard::to_stdvec(bad).unwrap());
        // The variant numbered one is `Remove`.
        assert!(
            matches!(crate::wire::next_record(&mut bytes.as_slice()), Err(FilesError::BadFrame)),
            "{bad}"
        );
        let mut applier = Applier::new(pair.targets.clone());
        applier.feed(&frame(&[Record::Begin(begin())])).unwrap();
        assert_eq!(applier.feed(&bytes).unwrap_err().code(), "bad_frame");
    }
}

#[test]
fn records_out_of_place_are_refused() {
    let pair = Pair::new();
    let data = |offset| Record::Data { offset, bytes: Blob(b"1234") };
    let end = |data_bytes| Record::FileEnd { meta: meta(), data_bytes };
    let cases: Vec<Vec<Record<'_>>> = vec![
        vec![data(0)],
        vec![end(0)],
        vec![Record::Begin(begin())],
        vec![file("f", 3, false), data(0)],
        vec![file("f", 8, false), data(u64::MAX)],
        vec![file("f", 8, false), Record::Hole { offset: 4, length: 5 }],
        vec![file("f", 8, false), data(0), end(3)],
        vec![file("f", 8, false), file("g", 8, false)],
        vec![file("f", 0, false), Record::End(Totals { files: 1, ..Totals::default() })],
        vec![Record::Special { path: path("d"), kind: Kind::Directory, meta: meta() }],
        vec![Record::Link { path: path("d"), to: RelPath::root() }],
        vec![Record::End(Totals::default()), Record::Remove(path("f"))],
    ];
    for records in cases {
        assert_eq!(refused(&pair, &records).code(), "out_of_place", "{records:?}");
    }
    let miscounted = refused(&pair, &[Record::End(Totals { files: 1, ..Totals::default() })]);
    assert_eq!(miscounted.code(), "miscounted");
    let mut applier = Applier::new(pair.targets.clone());
    let outside = applier.feed(&frame(&[Record::Remove(path("f"))])).unwrap_err();
    assert_eq!(outside.code(), "out_of_place");
    assert_eq!(applier.feed(b"\xff\xff\xff").unwrap_err().code(), "bad_frame");
}

#[test]
fn a_scope_by_name_is_kept_to() {
    let pair = Pair::new();
    write(&pair.to("other"), "other");
    let begin = || Record::Begin(Begin { only: Some(b"log".to_vec()), ..begin() });
    for record in [
        Record::Remove(path("other")),
        file("other", 0, false),
        Record::Link { path: path("log.1"), to: path("other") },
        Record::Link { path: path("other"), to: path("log") },
        Record::DirMeta { path: RelPath::root(), meta: meta() },
    ] {
        let mut applier = Applier::new(pair.targets.clone());
        let error = applier.feed(&frame(&[begin(), record])).unwrap_err();
        assert_eq!(error.code(), "out_of_place");
    }
    assert_eq!(fs::read(pair.to("other")).unwrap(), b"other");
}

#[test]
fn roots_versions_and_bases_are_checked() {
    let pair = Pair::new();
    let feed = |begin: Begin| Applier::new(pair.targets.clone()).feed(&frame(&[Record::Begin(begin)]));
    let other = RootId::new("volume:other").unwrap();
    assert_eq!(feed(Begin { root: other, ..begin() }).unwrap_err().code(), "unknown_root");
    assert_eq!(feed(Begin { version: VERSION + 1, ..begin() }).unwrap_err().code(), "bad_version");
    assert_eq!(feed(Begin { base: Some(pass_id()), ..begin() }).unwrap_err().code(), "wrong_base");

    let mut first = Applier::new(pair.targets.clone());
    first.feed(&frame(&[Record::Begin(begin())])).unwrap();
    assert_eq!(feed(begin()).unwrap_err().code(), "root_busy");
    drop(first);
    feed(begin()).unwrap();
}

#[test]
fn a_pass_that_was_cut_off_is_no_base() {
    let mut pair = Pair::new();
    for name in ["a", "b", "c"] {
        write(&pair.from(name), noise(3 << 20, 1));
    }
    pair.pass();
    write(&pair.from("b"), "changed");
    let base = pair.base.take();
    let mut applier = Applier::new(pair.targets.clone());
    let mut frames = 0;
    let mut sink = |frame: Bytes| {
        frames += 1;
        applier.feed(&frame[..frame.len() / 2]).map(|_| ()).map_err(|_| crate::SinkClosed)
    };
    let failed = pair.source.pass(base.clone(), &BTreeSet::new(), &mut sink);
    drop(applier);
    // Half a frame may hold whole records or not; either way the pass did not end.
    assert!(failed.is_ok() || matches!(failed, Err(FilesError::SinkClosed)));
    assert_eq!(pair.targets.holds(&id()), None);

    let mut applier = Applier::new(pair.targets.clone());
    let mut refused = None;
    let mut sink = |frame: Bytes| match applier.feed(&frame) {
        Ok(_) => Ok(()),
        Err(error) => {
            refused = Some(error);
            Err(crate::SinkClosed)
        }
    };
    let error = pair.source.pass(base, &BTreeSet::new(), &mut sink).unwrap_err();
    assert_eq!(error.code(), "sink_closed");
    assert_eq!(refused.unwrap().code(), "wrong_base");
    pair.pass();
    pair.assert_same();
}

#[test]
fn a_root_that_is_not_there_is_said() {
    let pair = Pair::new();
    fs::remove_dir(pair.to("")).unwrap();
    let error = Applier::new(pair.targets.clone()).feed(&frame(&[Record::Begin(begin())])).unwrap_err();
    assert_eq!(error.code(), "root_unavailable");
    fs::remove_dir(pair.from("")).unwrap();
    let error = pair.source.pass(None, &BTreeSet::new(), &mut |_: Bytes| Ok(())).unwrap_err();
    assert_eq!(error.code(), "root_unavailable");
    fs::create_dir(pair.to("")).unwrap();
    Applier::new(pair.targets.clone()).feed(&frame(&[Record::Begin(begin())])).unwrap();
}
