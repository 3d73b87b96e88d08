//! A cache on a disk that fills up: in memory, in a mount namespace of its own.

use std::fs;

use crate::space::{Space, through};

const PIPELINE: &str = r"
stages:
  small:
    kind: command
    pass_env: [RUNS]
    params: {run: 'echo x >> $RUNS/small; echo 1 > $PIPE_OUTPUT_OUT', outputs: {out: {file: small}}}
  big:
    kind: command
    pass_env: [RUNS]
    inputs: {small: small}
    params: {run: 'echo x >> $RUNS/big; head -c 1000000 /dev/zero > $PIPE_OUTPUT_OUT', outputs: {out: {file: big}}}
";

/// `$0` is `pipe`. Runs on the small disk and on a larger one; what is said and left goes beside the cache.
const SCRIPT: &str = r#"
mkdir cache && mount -t tmpfs -o size=400k tmpfs cache || exit 77
step() {
  name=$1; shift
  "$0" "$@" >"$name.out" 2>"$name.err"
  echo $? >"$name.code"
}
step full run
find cache/records-v1 -type f >records
find cache/tmp cache/leases -mindepth 1 >left
step verified cache verify
mount -o remount,size=8m cache
step again run
step sound cache verify
"#;

/// Whether the script could be tried here.
fn tried(space: &Space) -> bool {
    for namespaces in [&["--mount"][..], &["--mount", "--map-root-user"]] {
        let program = [&["unshare"][..], namespaces, &["sh", "-c", SCRIPT]].concat();
        let mut command = through(&program, &space.command(&[]));
        let Ok(ran) = command.output() else { break };
        if space.path("full.code").exists() {
            assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
            return true;
        }
        let _ = fs::remove_dir(space.cache());
    }
    println!("not tried: nothing may be mounted here");
    false
}

fn check(space: &Space, says: &[&str]) {
    if !tried(space) {
        return;
    }
    let read = |name: &str| fs::read_to_string(space.path(name)).unwrap();
    let said = read("full.err");
    assert_eq!(read("full.code"), "4\n", "{said}");
    for say in says.iter().chain([&"No space left on device"]) {
        assert!(said.contains(say), "`{say}`: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
    // The record of `small`, and nothing of `big`.
    assert_eq!(read("records").lines().count(), 1);
    assert_eq!(read("left"), "");
    assert_eq!(read("verified.code"), "0\n", "{}", read("verified.out"));
    assert_eq!(read("again.code"), "0\n", "{}", read("again.err"));
    assert_eq!((space.runs("small"), space.runs("big")), (1, 2), "{}", read("again.err"));
    assert_eq!(read("sound.code"), "0\n", "{}", read("sound.out"));
}

#[test]
fn command_that_fills_the_disk_says_so_in_its_log() {
    let space = Space::new(PIPELINE);
    check(&space, &["big: failed: the command ended with exit code 1"]);
}

#[test]
fn disk_that_is_full_when_outputs_are_stored_publishes_nothing() {
    let space = Space::new(PIPELINE);
    // Takes what there is and is content; the list of so many files no longer fits.
    space.replace(
        "head -c 1000000 /dev/zero > $PIPE_OUTPUT_OUT', outputs: {out: {file: big}}",
        "cd $PIPE_OUTPUT_OUT; seq 500 | xargs touch; head -c 1000000 /dev/zero > big || true', outputs: {out: {dir: big}}",
    );
    check(
        &space,
        &[
            "big: failed: output `out` of stage `big`: could not ",
            "help: free some space on that disk and run again",
        ],
    );
}
