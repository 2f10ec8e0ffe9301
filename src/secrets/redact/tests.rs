use super::*;
use proptest::prelude::*;

fn all() -> Redactor {
    let mut redactor = Redactor::new(true);
    redactor.hide(&SecretString::from(OWN));
    redactor
}

const OWN: &str = "0wn-s3ssion-key";
/// One of each shape; none was ever anybody's.
fn samples() -> Vec<(&'static str, String)> {
    let random = |length: usize| "aB3dE6gH9jK2mN5pQ8rS1tU4vW7xY0zA".chars().cycle().take(length).collect::<String>();
    let jwt = format!("eyJ{}.eyJ{}.{}", random(30), random(40), random(43));
    let pem = |label: &str| {
        let line = random(64);
        format!("-----BEGIN {label}-----\n{line}\n{line}\nab==\n-----END {label}-----")
    };
    let mut samples: Vec<_> = [
        ("sk-", 48),
        ("sk-ant-api03-", 80),
        ("sk-proj-", 60),
        ("sk-or-v1-", 64),
        ("AIza", 35),
        ("ya29.", 60),
        ("gsk_", 52),
        ("xai-", 80),
        ("pplx-", 48),
        ("hf_", 34),
        ("r8_", 37),
        ("ghp_", 36),
        ("gho_", 36),
        ("ghu_", 36),
        ("ghs_", 36),
        ("ghr_", 36),
        ("github_pat_", 82),
        ("glpat-", 20),
        ("AKIA", 16),
        ("ASIA", 16),
        ("xoxb-", 50),
        ("xoxp-", 50),
        ("xoxa-", 50),
        ("xoxs-", 50),
        ("xapp-", 50),
        ("npm_", 36),
        ("pypi-", 150),
        ("sk_live_", 24),
        ("rk_live_", 24),
        ("sk_test_", 24),
        ("SG.", 66),
        ("dop_v1_", 64),
    ]
    .into_iter()
    .map(|(begins, length)| (begins, format!("{begins}{}", random(length))))
    .collect();
    samples.extend(["Bearer ", "bearer ", "BEARER "].map(|word| (word, format!("{word}{}", random(40)))));
    samples.push(("eyJ", jwt));
    // A header, and below a label, of the longest that is taken.
    samples.push(("eyJ", format!("eyJ{}.eyJ{}.{}", random(1024), random(40), random(43))));
    let longest = format!("{} PRIVATE KEY", "X".repeat(36));
    for label in ["PRIVATE KEY", "RSA PRIVATE KEY", "OPENSSH PRIVATE KEY", "PGP PRIVATE KEY BLOCK", &longest] {
        samples.push(("-----BEGIN ", pem(label)));
    }
    samples
}

#[test]
fn each_shape_is_found_and_nothing_beside_it_is_taken() {
    let redactor = Redactor::new(true);
    let mut missing: Vec<_> = shapes::beginnings().collect();
    for (begins, secret) in samples() {
        missing.retain(|known| *known != begins);
        for (before, after) in
            [("", ""), ("key: ", "\nnext"), ("KEY=\"", "\" rest"), ("\u{1b}[01;31m", "\u{1b}[m."), ("a\\n", "\\n")]
        {
            let cleaned =
                redactor.clean(&format!("{before}{secret}{after}")).unwrap_or_else(|| panic!("{secret} stays"));
            let (word, kind) = if begins.ends_with(' ') && begins != "-----BEGIN " {
                (begins, cleaned.found[0])
            } else {
                ("", cleaned.found[0])
            };
            assert_eq!(
                cleaned.text,
                format!("{before}{word}[redacted: {kind}]{after}").replace("]\\n", "]\\n"),
                "{secret}"
            );
            assert_eq!(cleaned.found.len(), 1, "{secret}");
        }
    }
    assert!(missing.is_empty(), "no sample begins with {missing:?}");
}

#[test]
fn what_only_looks_a_little_like_one_stays() {
    let redactor = all();
    for text in [
        "",
        "plain",
        "a task-force-Of-20-people-and-more-than-that",
        ".sk-fading-circle-wrapper-and-so-on { }",
        "sk-short1",
        "Bearer authentication-is-required-here",
        "send `Authorization: Bearer <your token>` or Bearer $TOKEN",
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
        "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----",
        "eyJhbGciOiJIUzI1NiJ9 is a header alone",
        "eyJhbGciOiJIUzI1NiJ9.not an object",
        "MAKIA1234567890ABCDEF12",
        "ghp_tooShort123",
        "0wn-s3ssion-kez",
        "ünïcödé -----",
    ] {
        assert_eq!(redactor.clean(text), None, "{text}");
        for at in (0..=text.len()).filter(|at| text.is_char_boundary(*at)) {
            assert_eq!(in_pieces(&redactor, &[&text[..at], &text[at..]]).text, text);
        }
    }
}

#[test]
fn a_key_in_a_program_takes_no_program_with_it() {
    let redactor = Redactor::new(true);
    let program = r#"if text.startswith("-----BEGIN PRIVATE KEY-----"): return True"#;
    assert_eq!(
        redactor.clean(program).unwrap().text,
        r#"if text.startswith("[redacted: a private key]"): return True"#
    );
    let endless = format!("-----BEGIN PRIVATE KEY-----\n{}", "word ".repeat(20_000));
    assert!(redactor.clean(&endless).unwrap().text.len() > 60_000);
}

#[test]
fn keys_in_other_writings_of_a_file_are_found_to_their_end() {
    let redactor = Redactor::new(true);
    let json = r#"{"private_key": "-----BEGIN PRIVATE KEY-----\nMIIEvQ\nabc=\n-----END PRIVATE KEY-----\n", "x": 1}"#;
    assert_eq!(redactor.clean(json).unwrap().text, r#"{"private_key": "[redacted: a private key]\n", "x": 1}"#);
    let numbered =
        "00001| -----BEGIN EC PRIVATE KEY-----\n00002| MHcCAQ+/\n00003| -----END EC PRIVATE KEY-----\n00004| x";
    assert_eq!(redactor.clean(numbered).unwrap().text, "00001| [redacted: a private key]\n00004| x");
}

#[test]
fn the_own_key_is_found_wherever_it_is_and_without_shapes_too() {
    let mut redactor = Redactor::new(false);
    redactor.hide(&SecretString::from(OWN));
    assert_eq!(redactor.clean(&format!("x{OWN}y{OWN}")).unwrap().found.len(), 2);
    assert_eq!(redactor.clean(&samples()[0].1), None);
    redactor.hide(&SecretString::from("another-of-its-keys"));
    assert_eq!(redactor.clean(&format!("another-of-its-keys, {OWN}")).unwrap().found.len(), 2);
    // One so short would be everywhere.
    redactor.hide(&SecretString::from("k"));
    assert_eq!(redactor.clean("keks"), None);
    assert!(!format!("{:?}", all()).contains(OWN));
}

#[test]
fn a_value_is_cleaned_through_and_through() {
    let mut value = serde_json::json!({ "a": [OWN, { "b": format!("x {OWN}") }], OWN: 1, "n": null, "t": true });
    let mut found = Vec::new();
    all().clean_value(&mut value, &mut found);
    assert_eq!(found.len(), 3);
    assert!(!value.to_string().contains(OWN), "{value}");
    assert_eq!((&value["t"], value.as_object().unwrap().len()), (&serde_json::json!(true), 4));
}

fn in_pieces(redactor: &Redactor, pieces: &[&str]) -> Cleaned {
    let mut scanner = Scanner::default();
    let mut all = Cleaned::default();
    for piece in pieces {
        let cleaned = scanner.push(redactor, piece);
        assert!(scanner.held.len() <= MAX_HELD && scanner.before.len() <= MAX_BEFORE);
        all.text.push_str(&cleaned.text);
        all.found.extend(cleaned.found);
    }
    let cleaned = scanner.finish(redactor);
    all.text.push_str(&cleaned.text);
    all.found.extend(cleaned.found);
    all
}

/// At most the first two characters of a secret, where it was cut after them.
fn without_first_characters(text: &str, secret: &str) -> String {
    let begins: String = secret.chars().take(2).collect();
    let one: String = secret.chars().take(1).collect();
    text.replace(&format!("{begins}[redacted"), "[redacted").replace(&format!("{one}[redacted"), "[redacted")
}

#[test]
fn a_secret_that_is_cut_in_two_is_found_wherever_it_is_cut() {
    let redactor = all();
    let samples = || samples().into_iter().chain([("own", OWN.to_owned())]);
    let in_word =
        samples().filter(|(begins, _)| ["own", "-----BEGIN "].contains(begins)).map(|(_, secret)| ("word", secret));
    for (before, secret) in samples().map(|(_, secret)| ("before ", secret)).chain(in_word) {
        let text = format!("{before}{secret}\" after");
        let whole = redactor.clean(&text).unwrap();
        for at in 0..=text.len() {
            let cleaned = in_pieces(&redactor, &[&text[..at], &text[at..]]);
            assert_eq!(
                without_first_characters(&cleaned.text, &secret),
                without_first_characters(&whole.text, &secret),
                "cut at {at}: {text}"
            );
            assert_eq!(cleaned.found, whole.found);
        }
        let characters: Vec<_> = text.split("").collect();
        let cleaned = in_pieces(&redactor, &characters);
        assert_eq!(
            without_first_characters(&cleaned.text, &secret),
            without_first_characters(&whole.text, &secret),
            "{text}"
        );
    }
}

/// The second one stands behind a character that is no part of the text any more.
#[test]
fn a_secret_right_after_another_is_found_wherever_it_is_cut() {
    let redactor = all();
    let text = format!("{OWN}Bearer {}", "aB3dE6gH9jK2mN5pQ8rS1tU4");
    let whole = redactor.clean(&text).unwrap();
    assert_eq!(whole.text, "[redacted: the session's key]Bearer [redacted: a bearer token]");
    for at in 0..=text.len() {
        assert_eq!(in_pieces(&redactor, &[&text[..at], &text[at..]]).found, whole.found, "cut at {at}");
    }
}

#[test]
fn what_cannot_be_one_is_not_held_back() {
    let redactor = all();
    let mut scanner = Scanner::default();
    for piece in ["The task", " is to ask", " for a risk", "-free way.", "\n", "é", "sk"] {
        assert_eq!(scanner.push(&redactor, piece).text, piece);
    }
}

proptest! {
    #[test]
    fn cuts_do_not_matter(
        parts in prop::collection::vec((0usize..40, "[ -~\\n]{0,12}"), 0..6),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let redactor = all();
        let samples = samples();
        let mut text = String::new();
        let mut secrets = vec![];
        for (which, between) in parts {
            text.push_str(&between);
            text.push(' ');
            if let Some((_, secret)) = samples.get(which) {
                text.push_str(secret);
                text.push_str("\" ");
                secrets.push(secret.clone());
            }
        }
        let mut at: Vec<_> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
        at.extend([0, text.len()]);
        at.sort_unstable();
        let pieces: Vec<_> = at.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        let cleaned = in_pieces(&redactor, &pieces);
        for secret in &secrets {
            // Nothing of it but its first characters.
            let body = secret.strip_prefix("Bearer ").or(secret.strip_prefix("bearer ")).or(secret.strip_prefix("BEARER ")).unwrap_or(secret);
            prop_assert!(!cleaned.text.contains(&body[2..]), "{}", cleaned.text);
        }
        let whole = redactor.clean(&text);
        prop_assert_eq!(whole.map_or(0, |whole| whole.found.len()), cleaned.found.len());
    }
}
