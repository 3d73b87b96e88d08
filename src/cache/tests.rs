#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::time::SystemTime;

use serde_json::json;

use super::*;
use crate::digest::Digest;
use crate::fingerprint::{Identity, SCHEMA};
use crate::record::OutputRecord;

fn cache() -> (tempfile::TempDir, Cache) {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::open(&dir.path().join("cache")).unwrap();
    (dir, cache)
}

fn record(cache: &Cache, text: &str) -> Record {
    let work = cache.work_dir().unwrap();
    let path = work.path().join("out.txt");
    fs::write(&path, text).unwrap();
    let stored = cache.ingest(&path, OutputForm::File).unwrap();
    let identity = Identity {
        schema: SCHEMA,
        kind: "command".into(),
        version: "1".into(),
        params: json!({"text": "fixed"}),
        inputs: BTreeMap::new(),
        env: BTreeMap::new(),
        lock: None,
        upstream: BTreeMap::new(),
    };
    let output = OutputRecord {
        digest: stored.digest,
        form: OutputForm::File,
        class: OutputClass::Artifact,
        bytes: stored.bytes,
        file_name: "out.txt".into(),
        exec: false,
    };
    Record {
        fingerprint: identity.fingerprint(),
        identity,
        stage: "s".into(),
        params: json!({}),
        outputs: [("out".to_owned(), output)].into(),
        seconds: 1.0,
        started_at: 1,
        finished_at: 2,
        telemetry: serde_json::Map::new(),
        provenance: serde_json::Map::new(),
        warnings: vec![],
        lock: None,
    }
}

#[test]
fn opening_and_reading_create_nothing() {
    let (dir, cache) = cache();
    assert!(cache.record("command", Fingerprint([0; 32])).unwrap().is_none());
    assert!(cache.last("p", "s").is_none());
    assert!(!dir.path().join("cache").exists());
}

#[test]
fn first_record_of_a_fingerprint_stays_unless_superseded() {
    let (_dir, cache) = cache();
    let (one, two) = (record(&cache, "one"), record(&cache, "two"));
    cache.publish(&one, false).unwrap();
    cache.publish(&two, false).unwrap();
    assert_eq!(cache.record("command", one.fingerprint).unwrap(), Some(one.clone()));
    cache.publish(&two, true).unwrap();
    assert_eq!(cache.record("command", one.fingerprint).unwrap(), Some(two.clone()));
    assert_eq!(differing_artifacts(&one, &two), ["out"]);
}

#[test]
fn flipped_truncated_and_missing_objects_are_found_and_can_be_stored_again() {
    let (_dir, cache) = cache();
    let record_ = record(&cache, "content");
    let path = cache.object_path(record_.outputs["out"].digest);
    let spoil: [&dyn Fn(); 3] =
        [&|| fs::write(&path, "contenu").unwrap(), &|| fs::write(&path, "cont").unwrap(), &|| {
            fs::remove_file(&path).unwrap();
        }];
    for spoil in spoil {
        assert_eq!(cache.check(&record_), Ok(()));
        if path.exists() {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        }
        spoil();
        assert_eq!(cache.check(&record_).unwrap_err().output, "out");
        cache.clear_faults(&record_);
        assert!(!path.exists());
        assert_eq!(record(&cache, "content").outputs, record_.outputs);
    }
}

#[test]
fn damaged_record_counts_as_absent_and_is_replaced() {
    let (_dir, cache) = cache();
    let one = record(&cache, "one");
    cache.publish(&one, false).unwrap();
    let path = cache.record_path("command", one.fingerprint);
    let text = fs::read_to_string(&path).unwrap();
    for broken in [&text[..text.len() / 2], &text.replace("fixed", "other")] {
        fs::write(&path, broken).unwrap();
        assert_eq!(cache.record("command", one.fingerprint).unwrap(), None);
        cache.publish(&one, false).unwrap();
        assert_eq!(cache.record("command", one.fingerprint).unwrap(), Some(one.clone()));
    }
}

#[test]
fn tree_comes_back_with_names_and_exec_bits() {
    let (dir, cache) = cache();
    let work = cache.work_dir().unwrap();
    let tree = work.path().join("tree");
    fs::create_dir_all(tree.join("a/b")).unwrap();
    fs::write(tree.join("a/b/c.txt"), "c").unwrap();
    fs::write(tree.join("run.sh"), "#!/bin/sh\n").unwrap();
    fs::set_permissions(tree.join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    let before = cache.digest_local(&tree).unwrap();
    let stored = cache.ingest(&tree, OutputForm::Tree).unwrap();
    assert_eq!(stored.digest, before);
    let output = OutputRecord {
        digest: stored.digest,
        form: OutputForm::Tree,
        class: OutputClass::Artifact,
        bytes: stored.bytes,
        file_name: "tree".into(),
        exec: false,
    };
    let to = dir.path().join("out");
    cache.materialise(&output, &to.join("read")).unwrap();
    cache.copy_out(&output, &to.join("mine")).unwrap();
    for place in ["read", "mine"] {
        let at = to.join(place);
        assert_eq!(fs::read_to_string(at.join("a/b/c.txt")).unwrap(), "c");
        assert_ne!(fs::metadata(at.join("run.sh")).unwrap().permissions().mode() & 0o100, 0);
        assert_eq!(cache.digest_local(&at).unwrap(), stored.digest);
    }
    fs::write(to.join("mine/a/b/c.txt"), "edited").unwrap();
    assert_eq!(cache.verify(Digest::of(b"c"), Some(1)), Ok(()));
}

#[test]
fn one_lease_at_a_time_and_a_dead_holder_s_is_taken_over() {
    let (_dir, cache) = cache();
    let fp = Fingerprint([7; 32]);
    let Acquired::Mine(lease) = cache.lease(fp).unwrap() else { panic!("free lease refused") };
    assert!(matches!(cache.lease(fp).unwrap(), Acquired::Held(_)));
    let path = cache.root.join("leases").join(fp.to_hex());
    drop(lease);
    let mut dead = serde_json::from_value::<serde_json::Value>(json!({
        "host": rustix::system::uname().nodename().to_string_lossy(),
        "boot": fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim(),
        "processes": fs::read_link("/proc/self/ns/pid").unwrap(),
        "process": std::process::id(), "started": 0, "token": "x"
    }))
    .unwrap();
    fs::write(&path, dead.to_string()).unwrap();
    assert!(matches!(cache.lease(fp).unwrap(), Acquired::Mine(_)), "an earlier process");
    dead["boot"] = json!("another boot");
    dead["machine"] = json!("another machine of that name");
    fs::write(&path, dead.to_string()).unwrap();
    assert!(matches!(cache.lease(fp).unwrap(), Acquired::Held(_)), "a fresh heartbeat counts");
    dead["host"] = json!("elsewhere");
    fs::write(&path, dead.to_string()).unwrap();
    assert!(matches!(cache.lease(fp).unwrap(), Acquired::Held(_)), "a fresh heartbeat counts");
}

#[test]
fn what_is_made_in_a_folder_for_a_group_is_open_to_the_group_and_nothing_else_is() {
    let (dir, _cache) = cache();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for (around, folder, file) in [(0o2770, 0o770, 0o660), (0o770, 0o700, 0o600)] {
        let around_ = dir.path().join(format!("{around:o}"));
        fs::create_dir(&around_).unwrap();
        fs::set_permissions(&around_, fs::Permissions::from_mode(around)).unwrap();
        // As a umask of 077 leaves them.
        for (name, found) in [("folder", 0o700), ("file", 0o600)] {
            let made = around_.join(name);
            if name == "folder" {
                fs::create_dir(&made).unwrap();
            } else {
                fs::write(&made, "").unwrap();
            }
            fs::set_permissions(&made, fs::Permissions::from_mode(found)).unwrap();
            durable::share(&made, if name == "folder" { 0o070 } else { 0o060 });
            assert_eq!(mode(&made), if name == "folder" { folder } else { file }, "{around:o}");
        }
    }
}

#[test]
fn threads_storing_the_same_bytes_all_succeed() {
    let (_dir, cache) = cache();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| record(&cache, "the same"));
        }
    });
    assert_eq!(cache.verify(Digest::of(b"the same"), Some(8)), Ok(()));
}

#[test]
fn heart_on_another_host_is_watched_by_the_own_clock() {
    use std::time::{Duration, Instant};
    let watched = lease::Watched::default();
    let (start, clock) = (Instant::now(), SystemTime::now());
    let at = |seconds| start + Duration::from_secs(seconds);
    // Whatever the other host's clock says, an hour ahead or behind.
    for skew in [clock + Duration::from_secs(3600), clock - Duration::from_secs(3600)] {
        let token = format!("{skew:?}");
        assert!(watched.beats(&token, skew, at(0)));
        assert!(watched.beats(&token, skew, at(50)));
        assert!(watched.beats(&token, skew + Duration::from_secs(10), at(55)), "it beat");
        assert!(watched.beats(&token, skew + Duration::from_secs(10), at(110)));
        assert!(!watched.beats(&token, skew + Duration::from_secs(10), at(116)), "it stopped");
    }
    let days = clock - Duration::from_secs(3 * 24 * 3600);
    assert!(!watched.beats("long dead", days, at(0)), "nobody waits for that");
}

#[test]
fn repeated_request_is_no_reason_to_write_onto_an_object() {
    let (dir, cache) = cache();
    let record = record(&cache, "content");
    let output = &record.outputs["out"];
    let object = cache.object_path(output.digest);
    // The answer to the link was lost, and it was asked for again.
    let to = dir.path().join("linked");
    fs::hard_link(&object, &to).unwrap();
    cache.materialise(output, &to).unwrap();
    let other = dir.path().join("other");
    fs::write(&other, "mine").unwrap();
    assert!(cache.materialise(output, &other).is_err());
    assert_eq!(fs::read_to_string(&other).unwrap(), "mine");
    assert_eq!(fs::read_to_string(&object).unwrap(), "content");
    // The same for a record or a lease that took its place.
    let staged = durable::stage_bytes(&cache.tmp_dir(), b"x").unwrap();
    fs::hard_link(&staged, dir.path().join("placed")).unwrap();
    assert!(durable::link(&staged, &dir.path().join("placed")).is_ok());
    let another = durable::stage_bytes(&cache.tmp_dir(), b"y").unwrap();
    assert!(!durable::rename_exclusive(&another, &dir.path().join("placed")).unwrap());
}

#[test]
fn what_a_network_file_system_leaves_of_open_files_is_nobody_s() {
    let (dir, cache) = cache();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    fs::write(tree.join("a"), "a").unwrap();
    let before = cache.digest_local(&tree).unwrap();
    fs::write(tree.join(".nfs00000000000a1b2c00000001"), "open").unwrap();
    assert_eq!(cache.digest_local(&tree).unwrap(), before);
    fs::write(tree.join(".nfsrc"), "a user's").unwrap();
    assert_ne!(cache.digest_local(&tree).unwrap(), before);
}

fn old(path: &Path) {
    let then = SystemTime::now() - 3 * GRACE;
    fs::File::open(path).and_then(|file| file.set_modified(then)).unwrap();
}

#[test]
fn object_that_is_stored_again_after_gc_has_looked_stays() {
    let (_dir, cache) = cache();
    let paths = ["again", "nobody's"].map(|text| {
        let path = cache.object_path(record(&cache, text).outputs["out"].digest);
        old(&path);
        path
    });
    let held = cache.held().unwrap();
    record(&cache, "again");
    let options = GcOptions { older_than: None, max_bytes: None, dry_run: false };
    let mut collected = Collected::default();
    cache.collect_objects(options, &BTreeSet::new(), held, &mut collected).unwrap();
    assert_eq!(paths.map(|path| path.exists()), [true, false]);
    assert_eq!((collected.objects, collected.bytes_left), (1, 5));
    assert_eq!(cache.verify(Digest::of(b"again"), Some(5)), Ok(()));
}

#[test]
fn object_that_a_fetched_record_will_need_gets_young_also_where_it_is_another_s() {
    let (_dir, cache) = cache();
    let digest = record(&cache, "there").outputs["out"].digest;
    let path = cache.object_path(digest);
    old(&path);
    cache.renew(digest).unwrap();
    assert!(fs::metadata(&path).unwrap().modified().unwrap() > SystemTime::now() - GRACE);
    assert_eq!(cache.verify(digest, Some(5)), Ok(()));
    fs::remove_file(&path).unwrap();
    assert!(cache.renew(digest).is_err());
}

#[test]
fn checkpoints_of_a_failed_attempt_are_open_to_the_group_of_the_cache() {
    let (_dir, cache) = cache();
    fs::create_dir(&cache.root).unwrap();
    fs::set_permissions(&cache.root, fs::Permissions::from_mode(0o2770)).unwrap();
    let scratch = cache.scratch(Fingerprint([1; 32])).unwrap();
    let half = scratch.own().join("half");
    fs::write(&half, "half").unwrap();
    fs::set_permissions(&half, fs::Permissions::from_mode(0o600)).unwrap();
    scratch.keep();
    assert_eq!(fs::metadata(&half).unwrap().permissions().mode() & 0o777, 0o640);
}

#[test]
fn folder_among_the_objects_goes_as_a_file_would() {
    let (_dir, cache) = cache();
    let sound = cache.object_path(record(&cache, "sound").outputs["out"].digest);
    let stray = sound.parent().unwrap().join("stray");
    fs::create_dir(&stray).unwrap();
    fs::write(stray.join("file"), "").unwrap();
    old(&stray);
    old(&sound);
    let options = GcOptions { older_than: None, max_bytes: None, dry_run: false };
    assert_eq!(cache.collect(options).unwrap().objects, 2);
    assert!(!stray.exists() && !sound.exists());
}
