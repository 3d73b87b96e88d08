//! What a stage leaves as its output: links, files of others, modes, things that are no files.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::space::{Ran, Space};

/// One stage with a `dir` output, and what it does there.
fn folder(run: &str) -> Space {
    Space::new(&format!(
        "stages:\n  s:\n    kind: command\n    pass_env: [MINE]\n    \
         params: {{run: 'cd $PIPE_OUTPUT_OUT; {run}', outputs: {{out: {{dir: out}}}}}}\n"
    ))
}

/// The same with a `file` output.
fn file(run: &str) -> Space {
    Space::new(&format!(
        "stages:\n  s:\n    kind: command\n    pass_env: [MINE]\n    \
         params: {{run: '{run}', outputs: {{out: {{file: out}}}}}}\n"
    ))
}

/// Runs with `$MINE`, a folder of the user with two files.
fn run(space: &Space) -> Ran {
    let mine = space.outside().join("mine");
    fs::create_dir_all(mine.join("sub")).unwrap();
    fs::write(mine.join("a"), "mine").unwrap();
    fs::write(mine.join("sub/b"), "also mine").unwrap();
    fs::set_permissions(mine.join("a"), fs::Permissions::from_mode(0o640)).unwrap();
    crate::space::ran(&space.command(&["run"]).env("MINE", &mine).output().unwrap())
}

#[track_caller]
fn untouched(space: &Space) {
    let a = space.outside().join("mine/a");
    assert_eq!(fs::read_to_string(&a).unwrap(), "mine");
    assert_eq!(fs::metadata(&a).unwrap().mode() & 0o777, 0o640);
    assert_eq!(fs::read_to_string(space.outside().join("mine/sub/b")).unwrap(), "also mine");
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o777
}

/// What the umask of this process lets others read.
fn readable(space: &Space) -> u32 {
    let probe = space.outside().join("probe");
    fs::write(&probe, "").unwrap();
    mode(&probe) & 0o444
}

#[test]
fn link_out_of_an_output_is_refused_and_its_target_stays_as_it_was() {
    for (space, name) in [
        (folder("echo 1 > one; ln -s $MINE/a link"), "`link`"),
        (folder("echo 1 > one; mkdir d; ln -s $MINE d/link"), "`d/link`"),
        (folder("rmdir ../out; ln -s $MINE ../out"), "`out`"),
        (file("ln -s $MINE/a $PIPE_OUTPUT_OUT"), "`out`"),
    ] {
        let ran = run(&space).code(4);
        for said in [name, "-> `", "mine", "cp -L", "stage `s`"] {
            assert!(ran.err.contains(said), "{said}: {}", ran.err);
        }
        untouched(&space);
        assert!(!space.cache().join("records-v1").exists());
    }
}

#[test]
fn link_that_leads_nowhere_or_in_circles_is_refused() {
    for (run_, said) in [
        ("ln -s nothing link", "leads nowhere"),
        ("ln -s . link", "leads back to a folder"),
        ("mkdir a b; ln -s ../b a/x; ln -s ../a b/y", "leads back to a folder"),
        ("ln -s two one; ln -s one two", "could not follow"),
    ] {
        let space = folder(run_);
        let ran = run(&space).code(4);
        assert!(ran.err.contains(said), "{run_}: {}", ran.err);
    }
}

#[test]
fn links_inside_an_output_are_stored_as_what_they_point_to() {
    let space = folder(
        "mkdir -p lib/deep; echo 1 > lib/deep/one; chmod +x lib/deep/one; ln -s lib lib64; \
         ln -s lib64/deep/one again; ln -s $PIPE_OUTPUT_OUT/lib/deep/one absolute",
    );
    run(&space).code(0);
    space.pipe(&["plan", "--check"]).code(0);
    space.pipe(&["outputs", "s", "--to", "kept"]).code(0);
    for name in ["lib/deep/one", "lib64/deep/one", "again", "absolute"] {
        let path = space.path("kept/out").join(name);
        assert_eq!(fs::read_to_string(&path).unwrap(), "1\n", "{name}");
        assert!(fs::symlink_metadata(&path).unwrap().is_file(), "{name}");
        assert_ne!(mode(&path) & 0o100, 0, "{name}");
    }
    assert!(space.pipe(&["cache", "verify"]).code(0).out.contains("all sound"));
}

#[test]
fn file_with_another_name_is_copied_and_stays_writable() {
    for space in [folder("ln $MINE/a a; ln a b"), file("ln $MINE/a $PIPE_OUTPUT_OUT")] {
        run(&space).code(0);
        untouched(&space);
        let mine = fs::metadata(space.outside().join("mine/a")).unwrap();
        for object in space.objects() {
            assert_ne!(fs::metadata(object).unwrap().ino(), mine.ino());
        }
        fs::write(space.outside().join("mine/a"), "changed").unwrap();
        assert!(space.pipe(&["cache", "verify"]).code(0).out.contains("all sound"));
    }
}

#[test]
fn input_that_is_linked_through_to_an_output_is_stored_once() {
    let space = Space::new(
        r"
stages:
  one: {kind: command, params: {run: 'echo 1 > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}}
  two: {kind: command, inputs: {a: one}, params: {run: 'ln $PIPE_INPUT_A $PIPE_OUTPUT_OUT/a', outputs: {out: {dir: out}}}}
",
    );
    space.pipe(&["run"]).code(0);
    // The file and the listing.
    assert_eq!(space.objects().len(), 2);
    assert!(space.pipe(&["cache", "verify"]).code(0).out.contains("all sound"));
    space.pipe(&["plan", "--check"]).code(0);
}

#[test]
fn what_is_neither_file_nor_folder_is_named() {
    let space = folder("mkdir d; mkfifo d/queue");
    let ran = run(&space).code(4);
    assert!(ran.err.contains("`d/queue` is a named pipe"), "{}", ran.err);
}

#[test]
fn private_output_can_be_read_by_whom_the_umask_lets() {
    let spaces = [
        file("umask 077; echo 1 > $PIPE_OUTPUT_OUT"),
        file("new=$(mktemp); echo 1 > $new; mv $new $PIPE_OUTPUT_OUT"),
        folder("umask 077; mkdir d; echo 1 > d/one; chmod 700 d/one"),
    ];
    for space in spaces {
        run(&space).code(0);
        for object in space.objects() {
            assert_eq!(mode(&object), readable(&space), "{}", object.display());
        }
    }
}

/// Runs as a user who is not root, to whom nothing is denied; `None` where such a user cannot start
/// the binary.
fn as_user(space: &Space, args: &[&str]) -> Option<Ran> {
    let mut command = space.command(args);
    command.env("MINE", space.outside().join("mine"));
    if fs::metadata("/proc/self").unwrap().uid() == 0 {
        command.uid(65534).gid(65534);
        let mut chown = Command::new("chown");
        chown.args(["-R", "65534:65534"]).arg(space.outside());
        assert!(chown.status().unwrap().success());
    }
    command.output().ok().map(|output| crate::space::ran(&output))
}

#[test]
fn object_that_may_not_be_read_is_no_damage() {
    let space = file("echo x >> $MINE/runs; echo 1 > $PIPE_OUTPUT_OUT");
    run(&space).code(0);
    let object = space.objects().remove(0);
    fs::set_permissions(&object, fs::Permissions::from_mode(0o000)).unwrap();
    // Another user's index does not know it.
    fs::remove_dir_all(space.outside().join(".cache")).unwrap();
    for args in [&["run"][..], &["plan"], &["cache", "repair"], &["cache", "verify"]] {
        let Some(ran) = as_user(&space, args) else {
            println!("not tried: other users cannot start the binary");
            return;
        };
        let said = ran.code(5);
        // Reports are wrapped.
        let words = (said.out + &said.err).replace('│', " ");
        let said = words.split_whitespace().collect::<Vec<_>>().join(" ");
        for part in ["cannot be read", "mode 0000", "chmod a+r"] {
            assert!(said.contains(part), "{args:?}, {part}: {said}");
        }
        assert!(object.exists());
        assert!(!space.cache().join("quarantine").exists());
    }
    let runs = || fs::read_to_string(space.outside().join("mine/runs")).unwrap().lines().count();
    assert_eq!(runs(), 1);
    // Made anew, it takes the place of the one that cannot be read.
    as_user(&space, &["run", "--force"]).unwrap().code(0);
    assert_eq!(runs(), 2);
    assert_eq!(mode(&object), readable(&space));
    as_user(&space, &["plan", "--check"]).unwrap().code(0);
}

#[test]
fn file_keeps_its_exec_bit_for_stages_for_people_and_in_gathered_folders() {
    let space = Space::new(
        r"
stages:
  build: {kind: command, matrix: {single: {word: [b]}}, params: {run: '(echo \#!/bin/sh; echo echo ${word}) > $PIPE_OUTPUT_OUT; chmod +x $PIPE_OUTPUT_OUT', outputs: {out: {file: program}}}}
  use: {kind: command, inputs: {program: {from: build, at: {}}}, params: {run: '$PIPE_INPUT_PROGRAM > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}}
  all: {kind: command, inputs: {built: {gather: build}}, params: {run: 'for p in $PIPE_INPUT_BUILT/*/program; do $p; done > $PIPE_OUTPUT_OUT', outputs: {out: {file: out}}}}
params: {word: a}
",
    );
    space.pipe(&["run", "build@*", "use", "all"]).code(0);
    space.pipe(&["plan", "--check", "use", "all"]).code(0);
    space.pipe(&["outputs", "build", "--to", "kept"]).code(0);
    assert_ne!(mode(&space.path("kept/program")) & 0o100, 0);
    space.pipe(&["outputs", "all", "--to", "kept"]).code(0);
    assert_eq!(fs::read_to_string(space.path("kept/out")).unwrap().lines().count(), 2);
    // Without it, the same bytes are another input.
    space.replace("; chmod +x $PIPE_OUTPUT_OUT", "");
    let broken = space.pipe(&["run", "use"]).code(4);
    assert!(broken.err.contains("exit code 126"), "{}", broken.err);
}

#[test]
fn file_of_the_user_that_may_not_be_read_is_no_matter_of_the_cache() {
    let closed = file("echo 1 > $PIPE_OUTPUT_OUT; chmod 000 $PIPE_OUTPUT_OUT");
    let local = file("cat $PIPE_INPUT_F > $PIPE_OUTPUT_OUT");
    local.replace("    kind: command\n", "    kind: command\n    inputs: {f: {path: f.txt}}\n");
    local.write("f.txt", "1\n");
    fs::set_permissions(local.path("f.txt"), fs::Permissions::from_mode(0o000)).unwrap();
    for (space, code) in [(closed, 4), (local, 5)] {
        let Some(ran) = as_user(&space, &["run"]) else {
            println!("not tried: other users cannot start the binary");
            return;
        };
        let words = ran.code(code).err.replace('│', " ");
        let said = words.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(said.contains("let this user read it: `chmod a+r /"), "{said}");
        assert!(!said.contains("doctor") && !said.contains("group"), "{said}");
    }
}

#[test]
fn copy_of_a_program_that_may_not_be_executed_differs() {
    let space = file("echo true > $PIPE_OUTPUT_OUT; chmod +x $PIPE_OUTPUT_OUT");
    space.pipe(&["run"]).code(0);
    let copy = space.path("kept/out");
    let outputs = ["outputs", "s", "--to", "kept"];
    space.pipe(&outputs).code(0);
    space.pipe(&outputs).code(0);
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(space.pipe(&outputs).code(2).err.contains("is there already and differs"));
    space.pipe(&[&outputs[..], &["--force"]].concat()).code(0);
    assert_eq!(mode(&copy) & 0o100, 0o100);
}
