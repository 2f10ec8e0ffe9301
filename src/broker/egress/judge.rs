//! Which addresses a target may have: those that are dialled, or why there are none.

use super::refusals::Why;
use super::{BrokerConfig, Target};
use crate::broker::destination::{Reach, Refused};
use nix::ifaddrs::getifaddrs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use url::Host;

/// Why a target has no address that may be dialled.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unfit {
    Refused(Why),
    /// Its name, or the database's, cannot be looked up.
    Unknown,
}

/// Where clouds tell a machine about itself, its credentials included, beside the link-local addresses.
const METADATA: [IpAddr; 3] = [
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
];

/// The addresses of a target that may be dialled, at least one.
///
/// Whoever is asked for a name answers what it likes. So an entry that names a host in full may mean a private network,
/// but this machine itself, its links and its cloud's metadata are meant only by an entry that is the address, or
/// `localhost`. And the database is meant only by an entry that is just that.
pub(super) async fn addresses(config: &BrokerConfig, target: &Target) -> Result<Vec<SocketAddr>, Unfit> {
    let reach = config.egress.allow.reach(target).ok_or(Unfit::Refused(Why::NotAllowed))?;
    let mut found = resolved(config, target, reach).await?;
    if matches!(target.host(), Host::Domain(name) if name != "localhost") {
        let own = own_addresses().ok_or(Unfit::Refused(Why::NotPublic))?;
        found.retain(|address| !is_of_this_machine(address.ip(), &own));
    }
    if let Some(database) = config.egress.database.as_ref().filter(|database| database.port() == target.port())
        && (database != target || reach != Reach::Anywhere)
    {
        let database = resolved(config, database, Reach::Anywhere).await?;
        found.retain(|address| !database.contains(address));
    }
    if found.is_empty() { Err(Unfit::Refused(Why::NotPublic)) } else { Ok(found) }
}

async fn resolved(config: &BrokerConfig, target: &Target, reach: Reach) -> Result<Vec<SocketAddr>, Unfit> {
    let found = config.names.resolve(target, reach).await.map_err(|refused| match refused {
        Refused::Unknown { .. } => Unfit::Unknown,
        Refused::NotAllowed(_) | Refused::NotPublic(_) => Unfit::Refused(Why::NotPublic),
    })?;
    // Otherwise one address could be written in two ways, of which only one is looked for.
    Ok(found.into_iter().map(|address| SocketAddr::new(address.ip().to_canonical(), address.port())).collect())
}

/// The addresses of this machine's interfaces; `None` where the kernel does not say.
fn own_addresses() -> Option<Vec<IpAddr>> {
    let addresses = getifaddrs().ok()?.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    });
    Some(addresses.collect())
}

fn is_of_this_machine(address: IpAddr, own: &[IpAddr]) -> bool {
    let link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    address.is_loopback()
        || address.is_unspecified()
        || link_local
        || METADATA.contains(&address)
        || own.contains(&address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::EgressConfig;
    use crate::broker::destination::{Destinations, Names, Ports};
    use futures_util::FutureExt;
    use std::io;

    /// With names that have these addresses.
    fn config(allow: &str, names: &'static [(&'static str, &'static [&'static str])]) -> BrokerConfig {
        let names = Names::new(move |name| {
            let found = names.iter().find(|(known, _)| *known == name).map(|(_, addresses)| *addresses);
            let found = found.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound));
            async move { Ok(found?.iter().map(|text| text.parse().unwrap()).collect()) }.boxed()
        });
        let allow = Destinations::parse(allow, Ports::Required).unwrap();
        let egress = EgressConfig { allow, ..EgressConfig::default() };
        BrokerConfig { egress, names, ..BrokerConfig::default() }
    }

    async fn judged(config: &BrokerConfig, target: &str) -> Result<Vec<String>, Unfit> {
        let found = addresses(config, &Target::parse(target).unwrap()).await?;
        Ok(found.iter().map(ToString::to_string).collect())
    }

    const REFUSED: Unfit = Unfit::Refused(Why::NotPublic);

    #[tokio::test]
    async fn a_name_that_is_not_allowed_is_not_looked_up() {
        let names = Names::new(|name| panic!("asked for {name}"));
        let nobody = BrokerConfig { names, ..config("a.example:1", &[]) };
        for target in ["b.example:1", "a.example:2", "x.a.example:1", "10.0.0.1:1", "[::1]:1"] {
            assert_eq!(judged(&nobody, target).await, Err(Unfit::Refused(Why::NotAllowed)), "{target}");
        }
    }

    #[tokio::test]
    async fn a_full_name_may_be_on_a_private_network_and_one_below_a_suffix_not() {
        let config = config(
            "full.example:443,*.many.example:443",
            &[
                ("full.example", &["10.0.0.7", "1.1.1.1"]),
                ("in.many.example", &["10.0.0.7", "192.168.0.1", "fd00::1"]),
                ("both.many.example", &["10.0.0.7", "1.1.1.1"]),
            ],
        );
        assert_eq!(judged(&config, "full.example:443").await.unwrap(), ["10.0.0.7:443", "1.1.1.1:443"]);
        assert_eq!(judged(&config, "in.many.example:443").await, Err(REFUSED));
        assert_eq!(judged(&config, "both.many.example:443").await.unwrap(), ["1.1.1.1:443"]);
        assert_eq!(judged(&config, "gone.many.example:443").await, Err(Unfit::Unknown));
    }

    #[tokio::test]
    async fn this_machine_and_its_cloud_are_meant_by_their_addresses_alone() {
        let own = own_addresses().unwrap();
        assert!(own.contains(&Ipv4Addr::LOCALHOST.into()), "{own:?}");
        for inside in [
            "127.0.0.1",
            "127.9.9.9",
            "::1",
            "0.0.0.0",
            "::",
            "::ffff:127.0.0.1",
            "169.254.169.254",
            "fe80::1",
            "100.100.100.200",
            "168.63.129.16",
            "fd00:ec2::254",
        ] {
            let address: IpAddr = inside.parse().unwrap();
            assert!(is_of_this_machine(address.to_canonical(), &own), "{inside}");
        }
        assert!(own.iter().all(|own_one| is_of_this_machine(*own_one, &own)));
        assert!(!is_of_this_machine("192.0.2.1".parse().unwrap(), &own));

        let config = config(
            "rebound.example:80,localhost:80,127.0.0.1:80,169.254.169.254:80",
            &[("rebound.example", &["127.0.0.1", "169.254.169.254"]), ("localhost", &["127.0.0.1"])],
        );
        assert_eq!(judged(&config, "rebound.example:80").await, Err(REFUSED));
        assert_eq!(judged(&config, "localhost:80").await.unwrap(), ["127.0.0.1:80"]);
        assert_eq!(judged(&config, "127.0.0.1:80").await.unwrap(), ["127.0.0.1:80"]);
        assert_eq!(judged(&config, "169.254.169.254:80").await.unwrap(), ["169.254.169.254:80"]);
    }

    #[tokio::test]
    async fn the_database_is_meant_by_its_own_entry_alone() {
        let names: &'static [(&str, &[&str])] =
            &[("db.example", &["10.0.0.9", "1.1.1.1"]), ("x.example", &["10.0.0.9"]), ("y.example", &["10.0.0.8"])];
        let database = Target::parse("db.example:5432");
        let with = |allow| {
            let mut config = config(allow, names);
            config.egress.database = database.clone();
            config
        };
        let named = with("x.example:5432,y.example:5432,x.example:443,10.0.0.9:5432");
        assert_eq!(judged(&named, "x.example:5432").await, Err(REFUSED));
        assert_eq!(judged(&named, "10.0.0.9:5432").await, Err(REFUSED));
        assert_eq!(judged(&named, "y.example:5432").await.unwrap(), ["10.0.0.8:5432"]);
        assert_eq!(judged(&named, "x.example:443").await.unwrap(), ["10.0.0.9:443"]);
        assert_eq!(judged(&with("*.example:5432"), "db.example:5432").await, Err(REFUSED));
        assert_eq!(judged(&with("db.example:5432"), "db.example:5432").await.unwrap().len(), 2);
    }
}
