//! `profiles:`: what a profile changes, what comes after it, and what is refused.

use serde_json::Value;

use crate::space::Space;

const PIPELINE: &str = r"
params: {word: plain, tail: end}
profiles:
  loud:
    description: shouts
    params: {word: LOUD, say.shell: bash}
    cache: elsewhere
    jobs: 1
  quiet: {params: {word: hush}}
stages:
  say:
    kind: command
    params: {run: 'echo ${word} ${tail} > $PIPE_OUTPUT_O', outputs: {o: {file: o}}}
";

fn output(space: &Space, args: &[&str]) -> String {
    let found = [args, &["outputs", "say", "--to", "out"]].concat();
    space.pipe(&[args, &["run"]].concat()).code(0);
    space.pipe(&found).code(0);
    let text = std::fs::read_to_string(space.path("out/o")).unwrap();
    std::fs::remove_dir_all(space.path("out")).unwrap();
    text
}

#[test]
fn a_profile_changes_params_and_the_command_line_comes_after_it() {
    let space = Space::new(PIPELINE);
    assert_eq!(output(&space, &[]), "plain end\n");
    assert_eq!(output(&space, &["--profile", "quiet"]), "hush end\n");
    assert_eq!(output(&space, &["--profile", "quiet", "--set", "word=set"]), "set end\n");
}

#[test]
fn plan_shows_the_profile_and_takes_its_cache() {
    let space = Space::new(PIPELINE);
    let plan = space.pipe(&["--profile", "loud", "plan"]).code(0).out;
    assert!(
        plan.contains("profile loud: word=LOUD, say.shell=bash, cache elsewhere, 1 job"),
        "{plan}"
    );
    let json = space.pipe(&["--profile", "quiet", "plan", "--json"]).code(0).out;
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["profile"]["name"], "quiet");
    let mut run = space.command(&["run"]);
    run.env_remove("PIPE_CACHE").env("PIPE_PROFILE", "loud");
    assert!(run.output().unwrap().status.success());
    assert!(space.path("elsewhere/objects-v1").is_dir());
}

#[test]
fn mistakes_are_found_in_profiles_that_are_not_taken_too() {
    let space = Space::new(PIPELINE);
    let unknown = space.pipe(&["--profile", "loudd", "plan"]).code(3).err;
    assert!(unknown.contains("no profile `loudd`") && unknown.contains("`loud`"), "{unknown}");
    for (right, wrong, said) in [
        ("word: hush", "wrod: hush", "`wrod` is neither a variable nor a param"),
        ("jobs: 1", "jobs: none", "`jobs` must be a number from 1"),
        ("cache: elsewhere", "cash: elsewhere", "a profile has no key `cash`"),
        ("jobs: 1", "remote: {read: sometimes, url: x}", "`sometimes` is no policy"),
    ] {
        let space = Space::new(&PIPELINE.replace(right, wrong));
        let err = space.pipe(&["plan"]).code(3).err;
        assert!(err.contains(said), "{err}");
    }
}
