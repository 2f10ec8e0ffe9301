//! Where calls may go: hosts and ports as an operator allows them, and which addresses are the public's.
//!
//! Pure: nothing here looks a name up. Who connects judges the addresses that a name really has, and dials exactly
//! those that it has judged.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use url::{Host, Url};

/// What somebody wants to reach: a host in its one normal form (lower case, punycode, addresses as addresses) and a
/// port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    host: Host,
    port: u16,
}

impl Target {
    /// The host and port of a URL; `None` where it has none.
    pub fn of_url(url: &Url) -> Option<Self> {
        let host = url.host()?.to_owned();
        Some(Self { host: without_dot(host), port: url.port_or_known_default()? })
    }

    /// Reads `host:port`, as a `CONNECT` has it: an IPv6 address stands in brackets. `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let (host, port) = split(text).ok()?;
        Some(Self { host: host_of(host)?, port: port? })
    }

    /// The host: a name or an address.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Whose addresses a [`Target`] may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The operator has named this very host, and means it wherever it is.
    Anywhere,
    /// Only [public](is_public) ones.
    Public,
}

impl Reach {
    /// Whether an address is within it.
    pub fn includes(self, address: IpAddr) -> bool {
        self == Self::Anywhere || is_public(address)
    }

    /// The same of a host, where it is an address; what addresses a name has is not known here.
    fn includes_host(self, host: &Host) -> bool {
        match host {
            Host::Domain(_) => true,
            Host::Ipv4(address) => self.includes((*address).into()),
            Host::Ipv6(address) => self.includes((*address).into()),
        }
    }
}

/// Whether an entry of a list may stand without a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ports {
    /// Each entry names its port.
    Required,
    /// An entry without one means every port of the host.
    Optional,
}

/// Why a list cannot be read. It shows none of it: an entry is told by its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("entry {entry} {problem}")]
pub struct BadEntry {
    /// Its place in the list, from 1.
    pub entry: usize,
    /// What is wrong with it.
    pub problem: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Pattern {
    Exactly(Host),
    /// Every name that ends so, with the dot before it.
    Below(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    pattern: Pattern,
    /// `None`: every port.
    port: Option<u16>,
    reach: Reach,
}

/// The hosts that may be reached. None, unless they are said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Destinations(Vec<Entry>);

impl Destinations {
    /// Reads `host`, `host:port`, `*.suffix` and `*.suffix:port`, separated by commas. `*.suffix` means every name below
    /// it, and not itself; what is reached so must have a public address. A host that is named in full may be anywhere.
    ///
    /// # Errors
    /// The first entry that is none of these.
    pub fn parse(list: &str, ports: Ports) -> Result<Self, BadEntry> {
        entries(list, ports).collect::<Result<_, _>>().map(Self)
    }

    /// Every entry that [`Destinations::parse`] would refuse, in order.
    pub fn faults(list: &str, ports: Ports) -> Vec<BadEntry> {
        entries(list, ports).filter_map(Result::err).collect()
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing may be reached.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds one host and port.
    pub fn add(&mut self, target: Target, reach: Reach) {
        self.0.push(Entry { pattern: Pattern::Exactly(target.host), port: Some(target.port), reach });
    }

    /// The same hosts, but only where their addresses are public: for a list that no operator has written.
    #[must_use]
    pub fn public_only(mut self) -> Self {
        self.0.iter_mut().for_each(|entry| entry.reach = Reach::Public);
        self
    }

    /// How far a target may be, where some entry is about it: what the widest of them says.
    pub fn reach(&self, target: &Target) -> Option<Reach> {
        let fits = |entry: &&Entry| {
            entry.port.is_none_or(|port| port == target.port)
                && entry.pattern.fits(&target.host)
                && entry.reach.includes_host(&target.host)
        };
        let mut reaches = self.0.iter().filter(fits).map(|entry| entry.reach);
        let first = reaches.next()?;
        Some(if reaches.any(|reach| reach == Reach::Anywhere) { Reach::Anywhere } else { first })
    }
}

/// As an operator would write it, in normal form.
impl fmt::Display for Destinations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, entry) in self.0.iter().enumerate() {
            f.write_str(if at == 0 { "" } else { ", " })?;
            match &entry.pattern {
                Pattern::Exactly(host) => write!(f, "{host}")?,
                Pattern::Below(suffix) => write!(f, "*{suffix}")?,
            }
            if let Some(port) = entry.port {
                write!(f, ":{port}")?;
            }
        }
        Ok(())
    }
}

impl Pattern {
    fn fits(&self, host: &Host) -> bool {
        match (self, host) {
            (Self::Exactly(own), host) => own == host,
            (Self::Below(suffix), Host::Domain(name)) => name.len() > suffix.len() && name.ends_with(suffix.as_str()),
            (Self::Below(_), Host::Ipv4(_) | Host::Ipv6(_)) => false,
        }
    }
}

fn entries(list: &str, ports: Ports) -> impl Iterator<Item = Result<Entry, BadEntry>> {
    let read = move |(at, text): (usize, &str)| {
        entry(text.trim(), ports).map_err(|problem| BadEntry { entry: at + 1, problem })
    };
    list.split(',').enumerate().map(read)
}

fn entry(text: &str, ports: Ports) -> Result<Entry, &'static str> {
    const NO_HOST: &str = "is no host: a name, an IPv4 address, or an IPv6 address in brackets";
    if text.is_empty() {
        return Err("is empty");
    }
    if text.contains('/') {
        return Err("is a URL or a network: only its host and port are wanted");
    }
    let (host, port) = split(text)?;
    if port.is_none() && ports == Ports::Required {
        return Err("has no port");
    }
    let (pattern, reach) = match host.strip_prefix("*.") {
        Some(suffix) => match host_of(suffix) {
            Some(Host::Domain(suffix)) => (Pattern::Below(format!(".{suffix}")), Reach::Public),
            _ => return Err("has no name after `*.`"),
        },
        None => (Pattern::Exactly(host_of(host).ok_or(NO_HOST)?), Reach::Anywhere),
    };
    Ok(Entry { pattern, port, reach })
}

/// Host and port, the host as it is written.
fn split(text: &str) -> Result<(&str, Option<u16>), &'static str> {
    let host_ends = if text.starts_with('[') { text.find(']').map_or(0, |at| at + 1) } else { 0 };
    let Some(colon) = text[host_ends..].find(':') else { return Ok((text, None)) };
    let (host, port) = (&text[..host_ends + colon], &text[host_ends + colon + 1..]);
    if port.contains(':') {
        return Err("has more than one colon: an IPv6 address stands in brackets");
    }
    let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    let port = port.parse().ok().filter(|port| digits && *port != 0);
    port.map(|port| (host, Some(port))).ok_or("has no port from 1 to 65535 after its colon")
}

fn host_of(text: &str) -> Option<Host> {
    // A URL's parser would decode the percent signs, and takes a star for a letter.
    let host = if text.contains(['%', '*']) { None } else { Host::parse(text).ok() };
    host.map(without_dot).filter(|host| !matches!(host, Host::Domain(name) if name.is_empty() || name.starts_with('.')))
}

/// `example.com.` is `example.com`.
fn without_dot(host: Host) -> Host {
    match host {
        Host::Domain(name) => Host::Domain(name.strip_suffix('.').map(str::to_owned).unwrap_or(name)),
        address => address,
    }
}

/// Whether an address is the public's: reachable by everybody, and nobody's own network, machine or test. By IANA's
/// registries of special addresses; what is not known to be public is not.
pub fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let special = match a {
        // This network, private, loopback.
        0 | 10 | 127 => true,
        // Shared by a provider's customers (CGNAT); some clouds have their metadata there.
        100 => (64..128).contains(&b),
        // Link-local, with most clouds' metadata.
        169 => b == 254,
        172 => (16..32).contains(&b),
        // Protocol assignments, documentation, relays of 6to4, private.
        192 => matches!((b, c), (0, 0 | 2) | (88, 99) | (168, _)),
        // Benchmarks, documentation.
        198 => matches!((b, c), (18 | 19, _) | (51, 100)),
        203 => (b, c) == (0, 113),
        // Multicast, reserved, broadcast.
        224.. => true,
        _ => false,
    };
    // Looks public, but on Azure each machine's own host answers there.
    const AZURE_HOST: Ipv4Addr = Ipv4Addr::new(168, 63, 129, 16);
    !special && address != AZURE_HOST
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let [a, b, c, d, e, f, g, h] = address.segments();
    // NAT64: a public IPv4 address, as a network without IPv4 writes it.
    if (a, b, c, d, e, f) == (0x64, 0xff9b, 0, 0, 0, 0) {
        let [[i, j], [k, l]] = [g.to_be_bytes(), h.to_be_bytes()];
        return is_public_v4(Ipv4Addr::new(i, j, k, l));
    }
    // Everything else is loopback, unspecified, IPv4 in another form, local to a site or link, multicast, or nobody's.
    let global = a & 0xe000 == 0x2000;
    let special = match a {
        // Protocol assignments with Teredo, benchmarks and ORCHID; documentation.
        0x2001 => b < 0x200 || b == 0xdb8,
        // 6to4: an IPv4 address in disguise.
        0x2002 => true,
        // Documentation.
        0x3fff => b < 0x1000,
        _ => false,
    };
    global && !special
}

#[cfg(test)]
mod tests {
    use super::*;
    use Reach::{Anywhere, Public};

    fn target(text: &str) -> Target {
        Target::parse(text).unwrap_or_else(|| panic!("{text}"))
    }

    #[test]
    fn only_public_addresses_are_public() {
        for public in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.1",
            "169.253.0.1",
            "168.63.129.15",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.1",
            "192.167.255.255",
            "198.17.0.1",
            "198.20.0.0",
            "203.0.112.1",
            "223.255.255.255",
            "2001:200::1",
            "2001:4860:4860::8888",
            "2606:4700::1111",
            "2a00::1",
            "64:ff9b::1.1.1.1",
        ] {
            assert!(is_public(public.parse().unwrap()), "{public}");
        }
        for other in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "100.100.100.200",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.255",
            "168.63.129.16",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.1",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            // IPv4 in another form is refused even where it is public: nobody's name has it.
            "::ffff:1.1.1.1",
            "64:ff9b::127.0.0.1",
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::1.1.1.1",
            "100::1",
            "2001::1",
            "2001:2::1",
            "2001:20::1",
            "2001:db8::1",
            "2002:7f00:1::1",
            "3fff::1",
            "5f00::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            assert!(!is_public(other.parse().unwrap()), "{other}");
        }
    }

    #[test]
    fn a_list_says_who_may_be_reached_and_how_far_away() {
        let list = "models.example , API.example.com:443,*.Provider.example,*.tls.example:443,127.0.0.1:8080,[::1],\
                    bücher.example";
        let list = Destinations::parse(list, Ports::Optional).unwrap();
        for (asked, want) in [
            ("models.example:1", Some(Anywhere)),
            ("MODELS.example.:65535", Some(Anywhere)),
            ("a.models.example:1", None),
            ("api.example.com:443", Some(Anywhere)),
            ("api.example.com:80", None),
            ("provider.example:443", None),
            ("a.provider.example:443", Some(Public)),
            ("a.b.provider.example:80", Some(Public)),
            ("aprovider.example:443", None),
            ("a.provider.example.evil.example:443", None),
            ("a.tls.example:443", Some(Public)),
            ("a.tls.example:80", None),
            ("127.0.0.1:8080", Some(Anywhere)),
            // The same address in other words.
            ("0x7f.1:8080", Some(Anywhere)),
            ("2130706433:8080", Some(Anywhere)),
            ("127.0.0.1:80", None),
            ("127.0.0.2:8080", None),
            ("[::1]:9", Some(Anywhere)),
            ("[0:0::1]:9", Some(Anywhere)),
            ("[::ffff:127.0.0.1]:8080", None),
            ("xn--bcher-kva.example:1", Some(Anywhere)),
        ] {
            assert_eq!(list.reach(&target(asked)), want, "{asked}");
        }
        let url = |text: &str| list.reach(&Target::of_url(&text.parse().unwrap()).unwrap());
        assert_eq!(url("https://api.example.com/v1"), Some(Anywhere));
        assert_eq!(url("http://api.example.com/v1"), None, "another port");
        assert_eq!(url("https://api.example.com./v1"), Some(Anywhere));
        assert_eq!(url("http://127.1:8080"), Some(Anywhere));
        assert_eq!(Destinations::default().reach(&target("models.example:1")), None);
    }

    #[test]
    fn the_widest_word_counts_and_a_default_list_is_for_the_public_alone() {
        let both = Destinations::parse("*.example:443,in.example:443", Ports::Required).unwrap();
        assert_eq!(both.reach(&target("in.example:443")), Some(Anywhere));
        assert_eq!(both.reach(&target("out.example:443")), Some(Public));
        let mut public = both.public_only();
        assert_eq!(public.reach(&target("in.example:443")), Some(Public));
        public.add(target("in.example:443"), Anywhere);
        assert_eq!(public.reach(&target("in.example:443")), Some(Anywhere));
        assert_eq!(public.reach(&target("in.example:444")), None);
        let inside = Destinations::parse("127.0.0.1,1.1.1.1", Ports::Optional).unwrap().public_only();
        assert_eq!(inside.reach(&target("127.0.0.1:443")), None, "an address says by itself where it is");
        assert_eq!(inside.reach(&target("1.1.1.1:443")), Some(Public));
    }

    #[test]
    fn a_bad_entry_is_told_by_its_place_and_not_shown() {
        for (list, entry, problem) in [
            ("", 1, "is empty"),
            ("a:1,,b:1", 2, "is empty"),
            ("a:1,", 2, "is empty"),
            ("https://a.example", 1, "is a URL"),
            ("10.0.0.0/8:1", 1, "is a network"),
            ("a:1,b", 2, "has no port"),
            ("a:", 1, "has no port from"),
            ("a:0", 1, "has no port from"),
            ("a:65536", 1, "has no port from"),
            ("a:+1", 1, "has no port from"),
            ("::1:80", 1, "brackets"),
            ("[::1:80", 1, "brackets"),
            ("[::1]x:80", 1, "is no host"),
            (":80", 1, "is no host"),
            ("*:80", 1, "is no host"),
            ("a.*:80", 1, "is no host"),
            ("*a.example:80", 1, "is no host"),
            ("a b:80", 1, "is no host"),
            ("a%2eb:80", 1, "is no host"),
            ("user@a:80", 1, "is no host"),
            ("1.2.3.4.5:80", 1, "is no host"),
            ("*.:80", 1, "has no name"),
            ("*.10.0.0.1:80", 1, "has no name"),
            ("*.*.a:80", 1, "has no name"),
            ("*..a:80", 1, "has no name"),
        ] {
            let bad = Destinations::parse(list, Ports::Required).expect_err(list);
            let words: Vec<_> = problem.split(' ').collect();
            assert!(bad.entry == entry && words.iter().all(|word| bad.problem.contains(word)), "{list}: {bad}");
        }
        let all = Destinations::faults("a:1,b,*.c:443,d:0", Ports::Required);
        assert_eq!(all.iter().map(|bad| bad.entry).collect::<Vec<_>>(), [2, 4]);
        let shown = Destinations::parse("A.example:1 ,*.B.example:443,[0::1]:80", Ports::Required).unwrap();
        assert_eq!((shown.to_string().as_str(), shown.len()), ("a.example:1, *.b.example:443, [::1]:80", 3));
        for bad in ["a", "a:b", "::1:80", "", "a:80:", "a.example:80/x", "a%00:80"] {
            assert_eq!(Target::parse(bad), None, "{bad}");
        }
        assert_eq!(target("A.Example:80").to_string(), "a.example:80");
        assert_eq!(target("[::1]:80").to_string(), "[::1]:80");
    }
}
