//! runc's command line, as far as it concerns us: global options, `create`, `start`.

use std::ffi::{OsStr, OsString};

/// Global options of runc 1.0 to 1.3 that take a value, and those that do not.
const GLOBAL: Options = Options {
    valued: &["log", "log-format", "root", "criu", "rootless"],
    flags: &["debug", "systemd-cgroup", "help", "h", "version", "v"],
};
const CREATE: Options = Options {
    valued: &["bundle", "b", "console-socket", "pidfd-socket", "pid-file", "preserve-fds"],
    flags: &["no-pivot", "no-new-keyring"],
};
const START: Options = Options { valued: &[], flags: &[] };

/// What is asked of the runtime.
#[derive(Debug, PartialEq)]
pub(crate) enum Call<'a> {
    /// Create a container.
    Create(Create<'a>),
    /// Start a created one.
    Start {
        /// Which one.
        id: &'a str,
    },
    /// Anything else.
    Other,
    /// It has options that we do not know, or is a `create` or `start` of a form that we do not.
    Unclear,
}

/// `runc create`.
#[derive(Debug, PartialEq)]
pub(crate) struct Create<'a> {
    /// The global options, as given.
    pub(crate) globals: &'a [OsString],
    /// The container.
    pub(crate) id: &'a str,
    /// Options with their values, by their long names.
    pub(crate) options: Vec<(&'static str, &'a OsStr)>,
    /// Options without a value.
    pub(crate) flags: Vec<&'static str>,
}

/// Reads a command line (without the program's name).
pub(crate) fn parse(args: &[OsString]) -> Call<'_> {
    let Some(global) = GLOBAL.read(args) else { return Call::Unclear };
    let (globals, rest) = args.split_at(global.length);
    let Some((command, rest)) = rest.split_first() else { return Call::Other };
    let (create, options) = match command.to_str() {
        Some("create") => (true, CREATE),
        Some("start") => (false, START),
        _ => return Call::Other,
    };
    let Some(read) = options.read(rest) else { return Call::Unclear };
    match rest.get(read.length..) {
        Some([id]) => match id.to_str() {
            Some(id) if create => {
                Call::Create(Create { globals, id, options: read.options, flags: read.flags })
            }
            Some(id) => Call::Start { id },
            None => Call::Unclear,
        },
        _ => Call::Unclear,
    }
}

/// The value of a global option, the last one given.
pub(crate) fn global<'a>(args: &'a [OsString], name: &str) -> Option<&'a OsStr> {
    let read = GLOBAL.read(args)?;
    read.options.into_iter().rev().find(|(option, _)| *option == name).map(|(_, value)| value)
}

/// Whether a global option without a value was given.
pub(crate) fn has_global(args: &[OsString], name: &str) -> bool {
    GLOBAL.read(args).is_some_and(|read| read.flags.contains(&name))
}

struct Options {
    valued: &'static [&'static str],
    flags: &'static [&'static str],
}

struct Read<'a> {
    /// How many arguments are options, with their values.
    length: usize,
    options: Vec<(&'static str, &'a OsStr)>,
    flags: Vec<&'static str>,
}

impl Options {
    /// Reads options up to the first argument that is none. As Go's flag package does it: one or two dashes, the value
    /// after `=` or in the next argument, `--` ends the options. `None` for an option that is not known.
    fn read<'a>(&self, args: &'a [OsString]) -> Option<Read<'a>> {
        let mut read = Read { length: 0, options: Vec::new(), flags: Vec::new() };
        while let Some(arg) = args.get(read.length) {
            let text = arg.to_str();
            let Some(option) =
                text.and_then(|text| text.strip_prefix('-')).filter(|option| !option.is_empty())
            else {
                break;
            };
            read.length += 1;
            if option == "-" {
                break;
            }
            let option = option.strip_prefix('-').unwrap_or(option);
            let (name, value) =
                option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
            if let Some(name) = find(self.valued, name) {
                let value = match value {
                    Some(value) => OsStr::new(value),
                    None => {
                        let value = args.get(read.length)?;
                        read.length += 1;
                        value
                    }
                };
                read.options.push((if name == "b" { "bundle" } else { name }, value));
            } else if let Some(name) = find(self.flags, name) {
                match value {
                    None | Some("true" | "1" | "t" | "T" | "TRUE" | "True") => read.flags.push(name),
                    Some(_) => {}
                }
            } else {
                return None;
            }
        }
        Some(read)
    }
}

fn find(names: &'static [&'static str], name: &str) -> Option<&'static str> {
    names.iter().find(|known| **known == name).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn args(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(Into::into).collect()
    }

    #[test]
    fn docker_s_own_call_is_read() {
        let args = args(
            "--root /run/docker/runtime-runc/moby --log /b/log.json --log-format json --systemd-cgroup \
             create --bundle /b --pid-file /b/init.pid abc123",
        );
        let Call::Create(create) = parse(&args) else { panic!("{:?}", parse(&args)) };
        assert_eq!(create.id, "abc123");
        assert_eq!(create.globals.len(), 7);
        assert_eq!(create.options, [("bundle", OsStr::new("/b")), ("pid-file", OsStr::new("/b/init.pid"))]);
        assert_eq!(global(&args, "log"), Some(OsStr::new("/b/log.json")));
    }

    #[test]
    fn forms_of_options_mean_the_same() {
        for line in [
            "create --bundle=/b a",
            "create -bundle /b a",
            "create -b /b -- a",
            "create --b=/b --no-pivot=false a",
        ] {
            let args = args(line);
            let Call::Create(create) = parse(&args) else { panic!("{line}: {:?}", parse(&args)) };
            assert_eq!((create.id, create.flags.len()), ("a", 0), "{line}");
            assert_eq!(create.options, [("bundle", OsStr::new("/b"))], "{line}");
        }
    }

    #[test]
    fn what_is_not_ours_is_told_from_what_is_unclear() {
        for line in
            ["", "--version", "state a", "exec --process /p a", "delete --force a", "kill a 9", "features"]
        {
            assert_eq!(parse(&args(line)), Call::Other, "{line}");
        }
        for line in [
            "create",
            "create a b",
            "create --new-option x a",
            "--new-option x create a",
            "start --x a",
            "start",
        ] {
            assert_eq!(parse(&args(line)), Call::Unclear, "{line}");
        }
        assert_eq!(parse(&args("--debug start a")), Call::Start { id: "a" });
    }

    proptest! {
        /// Where `create` is not the command, no argument makes it one.
        #[test]
        fn another_command_is_never_taken_for_a_create(
            command in "state|exec|kill|delete|ps|events|pause|resume|update|run|restore",
            rest in prop::collection::vec("create|start|--bundle|-b|/x|[0-9a-f]{1,8}|--|=", 0..6),
        ) {
            let line: Vec<OsString> = std::iter::once(command).chain(rest).map(Into::into).collect();
            prop_assert_eq!(parse(&line), Call::Other);
        }

        #[test]
        fn nothing_makes_the_parser_fail(line in prop::collection::vec(any::<String>(), 0..8)) {
            let line: Vec<OsString> = line.into_iter().map(Into::into).collect();
            parse(&line);
            global(&line, "log");
        }
    }
}
