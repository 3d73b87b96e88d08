//! A cache shared over a remote: a folder, or a plain HTTP server on loopback.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::http::Server;
use crate::space::{DIAMOND, Ran, Space, ran};

/// The pipeline with a remote in the folder `remote` beside the project.
fn shared(extra: &str) -> Space {
    Space::new(&format!("remote: {{url: ../remote{extra}}}\n{DIAMOND}"))
}

fn with(space: &Space, args: &[&str], env: &[(&str, &str)]) -> Ran {
    let mut command = space.command(args);
    for name in ["PIPE_REMOTE", "PIPE_REMOTE_READ", "PIPE_REMOTE_WRITE", "PIPE_SIGN_KEY"] {
        command.env_remove(name);
    }
    // These tests may run in the build of a pull request themselves.
    for name in ["CI", "GITHUB_EVENT_NAME", "CI_PIPELINE_SOURCE"] {
        command.env_remove(name);
    }
    command.envs(env.iter().copied());
    ran(&command.output().unwrap())
}

/// Forgets the local cache.
fn forget(space: &Space) {
    fs::remove_dir_all(space.cache()).unwrap();
}

fn remote(space: &Space) -> PathBuf {
    space.outside().join("remote")
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

#[test]
fn everyone_reads_and_only_ci_writes() {
    let space = shared("");
    with(&space, &["run"], &[]).code(0);
    assert_eq!(files(&remote(&space)), Vec::<PathBuf>::new());
    with(&space, &["push"], &[]).code(2);
    let request = [("CI", "true"), ("GITHUB_EVENT_NAME", "pull_request")];
    let refused = with(&space, &["push"], &request).code(2);
    assert!(refused.err.contains("the build of a pull request"), "{}", refused.err);
    with(&space, &["run", "--force"], &request).code(0);
    assert_eq!(files(&remote(&space)), Vec::<PathBuf>::new());
    with(&space, &["push"], &[("CI", "true")]).code(0);
    assert_eq!(files(&remote(&space).join("records-v1")).len(), 4);
    forget(&space);
    let run = with(&space, &["run"], &[]).code(0);
    assert!(run.err.contains("0 run, 4 reused, 4 of them fetched"), "{}", run.err);
    assert_eq!(space.all_runs(), [2, 2, 2, 2]);
    with(&space, &["plan", "--check"], &[]).code(0);
    forget(&space);
    with(&space, &["run"], &[("PIPE_REMOTE_READ", "never")]).code(0);
    assert_eq!(space.all_runs(), [3, 3, 3, 3]);
}

#[test]
fn run_adds_what_it_made_and_its_remote_has_the_layout_of_a_cache() {
    let space = shared(", write: always");
    let run = with(&space, &["run"], &[]).code(0);
    assert!(run.err.contains("last: pushed"), "{}", run.err);
    let names = |root: PathBuf| -> Vec<PathBuf> {
        let shared = ["objects-v1", "records-v1"].map(|d| files(&root.join(d)));
        shared.concat().iter().map(|p| p.strip_prefix(&root).unwrap().to_owned()).collect()
    };
    assert_eq!(names(remote(&space)), names(space.cache()));
    let again = with(&space, &["push"], &[("CI", "1")]).code(0);
    assert!(again.err.contains("0 pushed, 4 there already"), "{}", again.err);
    let changed = with(&space, &["run", "--set", "left=three"], &[]).code(0);
    assert_eq!(changed.err.matches(": pushed").count(), 3, "{}", changed.err);
}

#[test]
fn what_lies_in_the_cache_already_gets_young_when_its_record_is_fetched() {
    let space = shared("");
    with(&space, &["run"], &[]).code(0);
    with(&space, &["push"], &[("CI", "true")]).code(0);
    fs::remove_dir_all(space.cache().join("records-v1")).unwrap();
    let then = SystemTime::now() - Duration::from_secs(3 * 3600);
    for object in space.objects() {
        fs::File::open(&object).and_then(|file| file.set_modified(then)).unwrap();
    }
    with(&space, &["pull", "left"], &[]).code(0);
    for object in space.objects() {
        let young = fs::metadata(&object).unwrap().modified().unwrap() > then;
        assert_eq!(young, fs::read_to_string(&object).unwrap() == "one\n", "{object:?}");
    }
}

#[test]
fn cache_over_the_cap_is_collected_after_what_was_only_fetched() {
    let space = shared("");
    with(&space, &["run"], &[]).code(0);
    with(&space, &["push"], &[("CI", "true")]).code(0);
    let then = SystemTime::now() - Duration::from_secs(15 * 24 * 3600);
    for fetch in ["run", "pull"] {
        forget(&space);
        let left = space.cache().join("quarantine/left");
        fs::create_dir_all(left.parent().unwrap()).unwrap();
        fs::write(&left, "something").unwrap();
        fs::File::open(&left).and_then(|file| file.set_modified(then)).unwrap();
        let fetched = with(&space, &[fetch], &[("PIPE_CACHE_CAP", "1")]).code(0).err;
        assert!(fetched.contains("the cache was looked through"), "{fetch}: {fetched}");
        assert!(!left.exists(), "{fetch}");
    }
}

#[test]
fn pull_fetches_what_is_there_and_runs_nothing() {
    let space = shared(", write: always");
    with(&space, &["run", "left"], &[]).code(0);
    forget(&space);
    let pull = with(&space, &["pull"], &[]).code(7);
    assert!(pull.err.contains("left: fetched"), "{}", pull.err);
    assert!(pull.err.contains("right: not fetched: the remote does not have it"), "{}", pull.err);
    assert!(pull.err.contains("join: not fetched: it needs what right makes"), "{}", pull.err);
    assert_eq!(space.all_runs(), [1, 0, 0, 0]);
    with(&space, &["pull", "left"], &[]).code(0);
    with(&space, &["plan", "--check", "left"], &[]).code(0);
    with(&space, &["pull"], &[("PIPE_REMOTE", "none")]).code(2);
}

#[test]
fn every_damaged_object_of_the_remote_is_refused_rebuilt_and_replaced() {
    let space = shared(", write: always");
    with(&space, &["run"], &[]).code(0);
    for object in files(&remote(&space).join("objects-v1")) {
        let before = fs::read(&object).unwrap();
        let mut flipped = before.clone();
        flipped[0] ^= 1;
        for damaged in [Some(flipped), Some(before[1..].to_vec()), None] {
            match damaged {
                Some(bytes) => fs::write(&object, bytes).unwrap(),
                None => fs::remove_file(&object).unwrap(),
            }
            forget(&space);
            let run = with(&space, &["run"], &[]).code(0);
            assert!(run.err.contains("1 run, 3 reused"), "{}", run.err);
            assert!(run.err.contains(", 3 of them fetched"), "{}", run.err);
            assert!(run.err.contains("is not used: object"), "{}", run.err);
            assert_eq!(fs::read(&object).unwrap(), before);
        }
    }
    forget(&space);
    let run = with(&space, &["run"], &[]).code(0);
    assert!(run.err.contains("4 of them fetched"), "{}", run.err);
}

#[test]
fn record_is_replaced_only_where_it_is_proven_incomplete() {
    let space = Space::new(
        "remote: {url: ../remote, write: always}\nstages:\n  now:\n    kind: command\n    pass_env: [RUNS]\n    params: {run: 'echo x >> $RUNS/now; cp $RUNS/now $PIPE_OUTPUT_OUT', outputs: {out: {file: o}}}\n",
    );
    with(&space, &["run"], &[]).code(0);
    let [record] = &files(&remote(&space).join("records-v1"))[..] else { panic!("one record") };
    let [object] = &files(&remote(&space).join("objects-v1"))[..] else { panic!("one object") };
    let (first, bytes) = (fs::read(record).unwrap(), fs::read(object).unwrap());
    let forced = with(&space, &["run", "--force"], &[]).code(0);
    assert!(forced.err.contains("keeps another result of now"), "{}", forced.err);
    assert_eq!(fs::read(record).unwrap(), first);
    fs::remove_file(object).unwrap();
    with(&space, &["push", "--verify"], &[]).code(0);
    assert_ne!(fs::read(record).unwrap(), first);
    fs::write(object, bytes).unwrap();
    fs::write(record, "{").unwrap();
    with(&space, &["push"], &[]).code(0);
    forget(&space);
    let run = with(&space, &["run"], &[]).code(0);
    assert!(run.err.contains("1 of them fetched"), "{}", run.err);
}

#[test]
fn unsigned_and_wrongly_signed_records_are_misses_with_a_reason() {
    let space = shared(", write: always");
    with(&space, &["run", "left"], &[]).code(0);
    let key = |name: &str| with(&space, &["keys", "new", name], &[]).code(0).out.trim().to_owned();
    let (ours, theirs) = (key("ours.key"), key("theirs.key"));
    assert_eq!(with(&space, &["keys", "show", "ours.key"], &[]).code(0).out.trim(), ours);
    with(&space, &["keys", "new", "ours.key"], &[]).code(2);
    space.replace("write: always", &format!("write: always, trusted_keys: ['{ours}']"));

    forget(&space);
    let run = with(&space, &["run", "left"], &[("PIPE_REMOTE_WRITE", "never")]).code(0);
    assert!(run.err.contains("left is not used: it is not signed"), "{}", run.err);
    assert_eq!(space.runs("left"), 2);
    forget(&space);
    with(&space, &["pull", "left"], &[]).code(7);
    for command in [["plan", "left"], ["why", "left"]] {
        let told = with(&space, &command, &[]).code(0);
        assert!(
            told.out.contains("the remote's record is not used: it is not signed"),
            "{}",
            told.out
        );
    }

    // Nobody would believe what is written without a key, or with another.
    let run = with(&space, &["run"], &[]).code(0);
    assert_eq!(run.err.matches("nobody would believe").count(), 1, "{}", run.err);
    let unsigned = with(&space, &["push", "left"], &[]).code(7);
    assert!(unsigned.err.contains("not signed by one of `trusted_keys`"), "{}", unsigned.err);
    space.replace("trusted_keys", "sign: theirs.key, trusted_keys");
    with(&space, &["push", "left"], &[]).code(7);
    space.replace("theirs.key", "ours.key");
    with(&space, &["push", "left"], &[]).code(0);
    forget(&space);
    with(&space, &["pull", "left"], &[]).code(0);

    space.replace(&ours, &theirs);
    forget(&space);
    let run = with(&space, &["pull", "left"], &[]).code(7);
    assert!(run.err.contains("signed by a key that is not among"), "{}", run.err);
    space.replace(&theirs, &ours);
    let [record] = &files(&remote(&space).join("records-v1"))[..] else { panic!("one record") };
    let forged = fs::read_to_string(record).unwrap().replace("\"left\"", "\"shift\"");
    fs::write(record, forged).unwrap();
    let run = with(&space, &["pull", "left"], &[]).code(7);
    assert!(run.err.contains("its signature by ed25519:"), "{}", run.err);
}

#[test]
fn remote_that_is_down_costs_one_warning() {
    let space = Space::new(DIAMOND);
    // A port that was free a moment ago refuses.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("http://127.0.0.1:{port}/cache");
    let run = with(&space, &["run"], &[("PIPE_REMOTE", &url)]).code(0);
    assert_eq!(run.err.matches("warning").count(), 1, "{}", run.err);
    assert!(run.err.contains("127.0.0.1") && run.err.contains("4 run"), "{}", run.err);
    let again = with(&space, &["run"], &[("PIPE_REMOTE", &url)]).code(0);
    assert!(!again.err.contains("warning"), "{}", again.err);
    with(&space, &["pull"], &[("PIPE_REMOTE", &url)]).code(0);
    forget(&space);
    with(&space, &["pull"], &[("PIPE_REMOTE", &url)]).code(7);
}

#[test]
fn http_is_read_and_neither_plans_nor_cached_runs_ask_it() {
    let space = shared(", write: always");
    with(&space, &["run"], &[]).code(0);
    let server = Server::start(remote(&space), true);
    let env = [("PIPE_REMOTE", server.url())];
    with(&space, &["plan"], &env).code(0);
    with(&space, &["why", "last"], &env).code(0);
    with(&space, &["run"], &env).code(0);
    forget(&space);
    let plan = with(&space, &["plan"], &env).code(0);
    assert!(plan.out.contains("a plan asks no network"), "{}", plan.out);
    let plan = with(&space, &["plan", "--json"], &env).code(0);
    assert!(plan.out.contains(&format!("\"remote\": \"{}\"", server.url())), "{}", plan.out);
    assert_eq!(server.requests(), 0);
    with(&space, &["run"], &env).code(0);
    assert!(server.requests() >= 8);
    assert_eq!(space.all_runs(), [1, 1, 1, 1]);
    let push = with(&space, &["push"], &env).code(2);
    assert!(push.err.contains("plain HTTP can be read only"), "{}", push.err);
}

/// A tree with an empty, a small, a middling and a big file.
const BIG: &str = "remote: {url: ../remote, write: always}\nstages:\n  big:\n    kind: command\n    pass_env: [RUNS]\n    params:\n      run: |\n        echo x >> $RUNS/big; mkdir -p $PIPE_OUTPUT_OUT/deep; cd $PIPE_OUTPUT_OUT\n        : > empty; echo small > deep/small; chmod +x deep/small\n        yes middling | head -c 3000000 > middling; yes big | head -c 40000000 > deep/big\n      outputs: {out: {dir: tree}}\n";

#[test]
fn big_objects_come_in_parts_and_where_a_transfer_ended() {
    let space = Space::new(BIG);
    with(&space, &["run"], &[]).code(0);
    for ranges in [true, false] {
        let server = Server::start(remote(&space), ranges);
        let env = [("PIPE_REMOTE", server.url())];
        forget(&space);
        with(&space, &["pull"], &env).code(0);
        with(&space, &["plan", "--check"], &env).code(0);
        with(&space, &["outputs", "big", "--to", "kept", "--force"], &env).code(0);
        let (whole, kept) = (server.bytes(), space.path("kept/tree/deep/big"));
        assert_eq!(fs::metadata(kept).unwrap().len(), 40_000_000);
        fs::remove_dir_all(space.path("kept")).unwrap();
        if ranges {
            forget(&space);
            server.break_after(25_000_000);
            with(&space, &["pull"], &env).code(7);
            server.break_after(u64::MAX);
            let before = server.bytes();
            with(&space, &["pull"], &env).code(0);
            assert!(server.bytes() - before < whole - 16_000_000, "{}", server.bytes() - before);
            with(&space, &["plan", "--check"], &env).code(0);
        }
    }
    assert_eq!(space.runs("big"), 1);
}

#[test]
fn remote_that_falls_silent_in_the_middle_costs_one_warning() {
    let after = "  after:\n    kind: command\n    inputs: {tree: big}\n    params: {run: 'ls $PIPE_INPUT_TREE > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}\n";
    let space = Space::new(&format!("{BIG}{after}"));
    with(&space, &["run"], &[]).code(0);
    let server = Server::start(remote(&space), true);
    forget(&space);
    server.falls_silent_after(25_000_000);
    let run = with(&space, &["run"], &[("PIPE_REMOTE", server.url())]).code(0);
    assert!(server.bytes() > 25_000_000, "{}", server.bytes());
    assert_eq!(run.err.matches("warning").count(), 1, "{}", run.err);
    assert!(run.err.contains("cannot be used: no answer"), "{}", run.err);
    assert!(run.err.contains("2 run, 0 reused"), "{}", run.err);
    with(&space, &["plan", "--check"], &[]).code(0);
}
