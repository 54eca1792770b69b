package symptom

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// Where there may be hundreds of a thing, a finding names the first few and counts the rest: they
// come from one cause, and a guest attribute has one line. Its key holds no count, so that one more
// is no news.
const (
	someNames = 3
	somePorts = 5 // with a finding of their own; the rest share one
)

// otherUser: the owner of an interception port is an Envoy, and not the user that the rules let
// out. Nothing may be redirected to it, since what it sends would come back to it.
func otherUser(f Facts) (out []Finding) {
	if f.UserErr != nil {
		return nil
	}
	for i, uid := range f.Processes {
		if uid == f.ProxyUID || slices.Contains(f.Processes[:i], uid) {
			continue
		}
		owner := Port{Owner: uid}
		var evidence, sockets []string
		for _, p := range f.Ports {
			if p.Listening && p.Owner == uid {
				owner.OwnerName = cmp.Or(owner.OwnerName, p.OwnerName)
				evidence = append(evidence, p.socket())
				if p.Addr.IsValid() {
					sockets = append(sockets, listens(p.Addr.Port()))
				}
			}
		}
		who, next := "Envoy runs", say("run Envoy as %s: root's traffic cannot be told from everybody "+
			"else's, so --proxy-user cannot be root; ports that a container publishes (`-p`) are root's: "+
			"give it the VM's network", name(f.ProxyUser))
		commands := []string{showEnvoys}
		if uid == 0 {
			commands = append(commands, "systemctl cat service-proxy-envoy", statusEnvoy)
		} else {
			// Any user can take the ports of an Envoy that is down, and answer as one. Nobody shall have
			// the VM's traffic because a command was pasted.
			user := word(owner.OwnerName, strconv.FormatUint(uint64(uid), 10))
			who = "What answers as Envoy runs"
			next = say("look who that is; run Envoy as %s, or, only if %s is meant to run it, set "+
				"--proxy-user=%s in /etc/default/service-proxy-agent and restart the agent",
				name(f.ProxyUser), user, user)
			commands = append(commands, fmt.Sprintf("ps -fu %d", uid))
			commands = append(commands, sockets[:min(len(sockets), 1)]...)
		}
		found := finding(EnvoyOtherUser, 15, Error, next,
			"%s as %s, and the rules let out %s (uid %d): its own traffic would come back to it, so "+
				"interception is off", who, owner.owner(), name(f.ProxyUser), f.ProxyUID).
			under(strconv.FormatUint(uint64(uid), 10)).
			try(commands...)
		for _, socket := range evidence {
			found = found.seen(FromSockets, time.Time{}, socket)
		}
		out = append(out, found)
	}
	return out
}

// rulesDiffer: what the daemon would repair, on a VM where it does not.
func rulesDiffer(f Facts) []Finding {
	differ := f.Differ
	if f.Brake.Off { // the jumps shall be out
		differ = slices.DeleteFunc(slices.Clone(differ), func(d iptables.Drift) bool {
			return d.Kind == iptables.JumpRemoved
		})
	}
	if len(differ) == 0 {
		return nil
	}
	count := "1 difference"
	if n := len(differ); n > 1 {
		count = fmt.Sprintf("%d differences, the first", n)
	}
	found := finding(RulesDiffer, 13, Error,
		"start the agent, which repairs them: `systemctl start service-proxy-agent`; "+
			"`service-proxy-agent diff` shows all",
		"The kernel's rules are not what Envoy needs, and no agent repairs them: %s: %v",
		count, differ[0]).
		try("sudo service-proxy-agent diff", "sudo systemctl start service-proxy-agent",
			"sudo journalctl -u service-proxy-agent -n 50")
	for _, d := range differ[:min(len(differ), someNames)] {
		found = found.seen(FromKernel, time.Time{}, d.String())
	}
	return []Finding{found}
}

// dropped: each port has its finding, up to a number.
func dropped(f Facts) (out []Finding) {
	all := slices.Clone(f.Dropped)
	slices.SortStableFunc(all, func(a, b Dropped) int {
		return cmp.Or(cmp.Compare(a.Family, b.Family), cmp.Compare(a.Port, b.Port),
			cmp.Compare(a.Interface, b.Interface))
	})
	for i, d := range all {
		if i == somePorts && len(all) > somePorts+1 {
			return append(out, droppedBesides(all[i:]))
		}
		rule, what := d.rule(), "rule"
		if d.Rule == "" {
			what = "policy"
		}
		if d.Interface != "" {
			out = append(out, droppedOfContainers(d, what))
			continue
		}
		seen := ""
		if d.At != 0 && d.At != d.Port {
			seen = fmt.Sprintf(" (it sees Envoy's port %d)", d.At)
		}
		out = append(out, finding(InputDropped, 20, Warning,
			say("let TCP %d in before that %s, or take it out", cmp.Or(d.At, d.Port), what),
			"%v traffic to serving port %d is dropped by the %s %s of table filter%s",
			d.Family, d.Port, what, rule, safe(seen)).
			under(d.Family.String()+" "+strconv.Itoa(int(d.Port))).
			seen(FromFilter, time.Time{}, rule).
			try(fmt.Sprintf("sudo %s -L %s -n -v --line-numbers", tables(d.Family),
				word(d.Chain, "CHAIN")),
				fmt.Sprintf("sudo %s -I INPUT -p tcp --dport %d -j ACCEPT", tables(d.Family),
					cmp.Or(d.At, d.Port))))
	}
	return out
}

// droppedOfContainers: what they send to services is redirected to this machine, and so comes to
// INPUT, where firewalls with a policy of DROP let in what they know.
func droppedOfContainers(d Dropped, what string) Finding {
	from := word(d.Interface, "INTERFACE")
	return finding(InputDropped, 20, Warning,
		say("let TCP %d in from %s before that %s", d.At, name(d.Interface), what),
		"%v connections to services from %s, which are redirected to Envoy's port %d, are dropped by "+
			"the %s %s of table filter", d.Family, name(d.Interface), d.At, what, d.rule()).
		under(d.Family.String()+" "+d.Interface).
		seen(FromFilter, time.Time{}, d.rule()).
		try(fmt.Sprintf("sudo %s -L %s -n -v --line-numbers", tables(d.Family),
			word(d.Chain, "CHAIN")),
			fmt.Sprintf("sudo %s -I INPUT -i %s -p tcp --dport %d -j ACCEPT", tables(d.Family), from, d.At))
}

func droppedBesides(rest []Dropped) Finding {
	found := finding(InputDropped, 20, Warning, "let them in before the rules that drop them",
		"Traffic to more serving ports is dropped by table filter: %s",
		few(rest, someNames, func(d Dropped) string {
			return say("%d (%v, %s)", cmp.Or(d.Port, d.At), d.Family, Printable(d.rule(), 100))
		})).under("more").try("sudo iptables -L -n -v --line-numbers",
		"sudo ip6tables -L -n -v --line-numbers")
	for _, d := range rest[:min(len(rest), someNames)] {
		found = found.seen(FromFilter, time.Time{}, fmt.Sprintf("%d: %s", cmp.Or(d.Port, d.At), d.rule()))
	}
	return found
}

func (d Dropped) rule() string {
	if d.Rule == "" {
		return "-P " + d.Chain + " DROP"
	}
	return "-A " + d.Chain + " " + d.Rule
}

// silent: each port has its finding, up to a number.
func silent(f Facts) (out []Finding) {
	all := slices.Sorted(slices.Values(f.Silent))
	const next = "start it, or take the port out of serving-ports; Envoy answers its clients with " +
		"an error until then"
	for i, port := range all {
		if i == somePorts && len(all) > somePorts+1 {
			return append(out, finding(ApplicationSilent, 21, Warning, next,
				"The application is not listening on more of the serving ports: %s",
				few(all[i:], somePorts, func(p uint16) string { return strconv.Itoa(int(p)) })).
				under("more").try("sudo ss -ltnp"))
		}
		out = append(out, finding(ApplicationSilent, 21, Warning, next,
			"The application is not listening on %d, a serving port: nothing listens there behind Envoy",
			port).under(strconv.Itoa(int(port))).
			seen(FromSockets, time.Time{}, fmt.Sprintf("no socket listens on TCP %d", port)).
			try(listens(port)))
	}
	return out
}

// clusters tells of panicking clusters and of others with unhealthy endpoints, the worst first.
func clusters(f Facts) (out []Finding) {
	var panics, others []Cluster
	for _, c := range f.Clusters {
		switch {
		case c.Panic || c.FewHealthy():
			panics = append(panics, c)
		case c.Healthy < c.Total:
			others = append(others, c)
		}
	}
	const next = "look at the endpoints' health checks, and at the firewall rule that lets them in"
	if len(panics) > 0 {
		out = append(out, f.ofClusters(finding(EndpointsPanic, 24, Warning,
			next+" (35.191.0.0/16, 130.211.0.0/22)",
			"Too few endpoints are healthy in %s: Envoy ignores health there and sends to all of them "+
				"(panic)",
			worst(panics)), panics))
	}
	if len(others) > 0 {
		out = append(out, f.ofClusters(finding(EndpointsUnhealthy, 31, Advice, next,
			"Some endpoints are unhealthy in %s: traffic may leave its zone or be spread badly",
			worst(others)), others))
	}
	return out
}

func (f Facts) ofClusters(found Finding, all []Cluster) Finding {
	for _, c := range all[:min(len(all), someNames)] {
		found = found.seen(FromClusters, time.Time{}, fmt.Sprintf(
			"%s: %d endpoints, %d healthy, %d degraded", name(c.Name), c.Total, c.Healthy, c.Degraded))
	}
	return found.try(f.ask("/clusters?format=json"),
		"gcloud compute backend-services list --global --project="+f.meshProject(),
		"gcloud compute backend-services get-health BACKEND_SERVICE --global --project="+
			f.meshProject())
}

// worst sorts the clusters in place, the fewest healthy first, and names some.
func worst(all []Cluster) safe {
	slices.SortFunc(all, func(a, b Cluster) int {
		return cmp.Or(cmp.Compare(a.Healthy*b.Total, b.Healthy*a.Total), cmp.Compare(b.Total, a.Total),
			cmp.Compare(a.Name, b.Name))
	})
	return few(all, someNames, func(c Cluster) string {
		return fmt.Sprintf("cluster %s (%d of %d healthy)", short(c.Name), c.Healthy, c.Total)
	})
}

// hangs is how long a heartbeat may be late. The platform takes an older one for a stuck agent.
const hangs = 5 * time.Minute

func agentStuck(f Facts) (out []Finding) {
	a := f.Agent
	if age := a.Now.Sub(a.Heartbeat); !a.Heartbeat.IsZero() && age > hangs {
		found := finding(AgentStuck, 28, Error,
			"nobody repairs the rules until it is restarted; systemd's watchdog does that, else `systemctl "+
				"restart service-proxy-agent`, which leaves them in place",
			"The agent is stuck: its last heartbeat is of %s, %v ago",
			a.Heartbeat.UTC().Format(time.RFC3339), age.Round(time.Second)).
			seen(FromAgent, a.Now, "heartbeat "+a.Heartbeat.UTC().Format(time.RFC3339)).
			try("systemctl status service-proxy-agent", "sudo journalctl -u service-proxy-agent -n 100",
				restartAgent)
		found.Since = a.Heartbeat
		out = append(out, found)
	}
	if !a.Killed.IsZero() {
		when := a.Killed.UTC()
		found := finding(AgentStuck, 28, Warning,
			"the journal has the stack it hung in; please open an issue with it",
			"An earlier run of the agent hung and was restarted by systemd's watchdog at %s",
			when.Format(time.RFC3339)).under("killed").
			seen(FromAgent, when, "watchdog").
			try(fmt.Sprintf("sudo journalctl -u service-proxy-agent --since='%s UTC' --until='%s UTC'",
				when.Add(-time.Minute).Format(time.DateTime), when.Add(time.Minute).Format(time.DateTime)))
		found.Since = when
		out = append(out, found)
	}
	return out
}

// nodeFields are what Traffic Director goes by in an Envoy's node.
var nodeFields = []struct {
	name string
	of   func(*Node) string
}{
	{"network", func(n *Node) string { return n.Network }},
	{"project", func(n *Node) string { return n.ProjectNumber }},
}

// identity: a bootstrap that somebody wrote by hand. With a configuration that came all the same it
// may be meant so.
func identity(f Facts) []Finding {
	if f.Node == nil || f.Presented == nil {
		return nil
	}
	var said []string
	for _, field := range nodeFields {
		want, have := field.of(f.Node), field.of(f.Presented)
		switch {
		case want == "", want == have:
		case have == "":
			said = append(said, fmt.Sprintf("no %s, where this VM's is %q", field.name, short(want)))
		default:
			said = append(said, fmt.Sprintf("%s %q, where this VM's is %q", field.name, short(have),
				short(want)))
		}
	}
	if len(said) == 0 {
		return nil
	}
	severity, next := Error, "correct node.id (projects/NUMBER/networks/NETWORK/nodes/NAME) and "+
		"node.metadata in Envoy's bootstrap, and restart Envoy"
	if f.Envoy.Configured && f.Envoy.Stream == nil {
		severity, next = Warning, "if that is not meant: "+next
	}
	return []Finding{finding(EnvoyIdentity, 29, severity, next,
		"Envoy presents itself to the control plane with %s (node %s)",
		safe(strings.Join(said, ", and ")), name(f.Presented.ID)).
		seen(FromEnvoy, time.Time{}, fmt.Sprintf("node.id %s, project number %q, network %q",
			name(f.Presented.ID), name(f.Presented.ProjectNumber), name(f.Presented.Network))).
		seen(FromMetadata, time.Time{}, fmt.Sprintf("project number %q, network %q",
			name(f.Node.ProjectNumber), name(f.Node.Network))).
		try(f.ask("/config_dump?resource=bootstrap"),
			askMetadata("", "project/numeric-project-id"),
			askMetadata("", "instance/network-interfaces/0/network"), restartEnvoy)}
}

// notOurs: the Envoy that answers was not started with what bootstrap wrote.
func notOurs(f Facts) []Finding {
	if f.Configured == nil || f.Running == nil {
		return nil
	}
	targets := func(c *EnvoyConfig) string {
		all := slices.Sorted(slices.Values(c.Targets))
		if len(all) == 0 {
			return "none"
		}
		return string(few(slices.Compact(all), someNames, short))
	}
	var said []string
	if want, have := targets(f.Configured), targets(f.Running); want != have {
		said = append(said, fmt.Sprintf("its control plane is %s, and %s was configured", have, want))
	}
	if want, have := f.Configured.NodeID, f.Running.NodeID; want != have {
		said = append(said, fmt.Sprintf("its node is %q, and %q was configured", name(have), name(want)))
	}
	if len(said) == 0 {
		return nil
	}
	return []Finding{finding(EnvoyNotOurs, 37, Error,
		"stop the other Envoy, and restart service-proxy-envoy; or have `service-proxy-agent bootstrap` "+
			"configure it anew",
		"The Envoy that runs is not the one that was configured: %s", safe(strings.Join(said, "; "))).
		seen(FromEnvoy, time.Time{}, evidenceOf(f.Running)).
		seen(FromState, time.Time{}, evidenceOf(f.Configured)).
		try("ps -o pid,user,lstart,args -C envoy", statusEnvoy, restartEnvoy)}
}

func evidenceOf(c *EnvoyConfig) string {
	text := fmt.Sprintf("node %s, control planes %s", name(c.NodeID), few(c.Targets, someNames, short))
	if c.From != "" {
		text = name(c.From) + ": " + text
	}
	return text
}

// A clock that is off by more than that.
const (
	clockOff   = 30 * time.Second // tokens and short certificates begin to fail
	clockWrong = 5 * time.Minute  // the platform takes the heartbeat for old, or of the future
)

func clock(f Facts) []Finding {
	off := f.Clock.Abs()
	if off <= clockOff {
		return nil
	}
	severity, how := Warning, "ahead of"
	if off > clockWrong {
		severity = Error
	}
	if f.Clock < 0 {
		how = "behind"
	}
	return []Finding{finding(ClockWrong, 30, severity,
		"have it set by NTP (metadata.google.internal): `chronyc makestep`, or restart systemd-timesyncd",
		"The clock of this VM is %v %s the metadata server's: TLS to the control plane fails with a "+
			"wrong clock, and the heartbeat looks old or of the future", off.Round(time.Second), how).
		seen(FromMetadata, time.Time{}, fmt.Sprintf("Date differs by %v", f.Clock.Round(time.Second))).
		try("timedatectl", askMetadata("-o /dev/null -D - ", "instance/id")+" | grep -i ^date; date -u",
			"sudo chronyc makestep || sudo systemctl restart systemd-timesyncd")}
}

func oldConnections(f Facts) []Finding {
	if len(f.Old) == 0 {
		return nil
	}
	count, them := "A connection", "it ends by itself; restart its program to have it"
	all := max(f.OldCount, len(f.Old))
	if n := all; n > 1 {
		count, them = fmt.Sprintf("%d connections", n),
			"they end by themselves; restart their programs to have them"
	}
	found := finding(OldConnections, 33, Advice, them+" intercepted now",
		"%s from before the rules, and so past Envoy: %s", count,
		f.oldNames(all))
	for _, c := range f.Old[:min(len(f.Old), someNames)] {
		found = found.seen(FromConntrack, time.Time{}, c.String())
	}
	for i, c := range f.Old[:min(len(f.Old), someNames)] {
		if !slices.ContainsFunc(f.Old[:i], func(was OldConnection) bool { return was.To == c.To }) {
			found = found.try("sudo ss -tnp dst '" + plainAddr(c.To).String() + "'")
		}
	}
	return []Finding{found}
}

// oldNames names some of so many: the facts have the first of them alone.
func (f Facts) oldNames(all int) safe {
	if all == len(f.Old) {
		return few(f.Old, someNames, OldConnection.String)
	}
	some := f.Old[:min(len(f.Old), someNames)]
	return few(some, someNames, OldConnection.String) +
		safe(fmt.Sprintf(", and %d more", all-len(some)))
}

func (c OldConnection) String() string {
	return fmt.Sprintf("%v to %v (uid %d)", plainAddr(c.From), plainAddr(c.To), c.UID)
}

// plainAddr is without a zone, which is a name.
func plainAddr(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().WithZone(""), a.Port())
}

func conntrack(f Facts) []Finding {
	c := f.Conntrack
	const setting = "net.netfilter.nf_conntrack_max"
	var found Finding
	switch level := c.Level(); {
	case level == Error && c.Dropped > 0:
		found = finding(ConntrackFull, 35, Error, "raise the sysctl "+setting,
			"The connection tracking table is full: %d of %d entries, and %d packets were dropped for it; "+
				"new connections fail", c.Count, c.Max, c.Dropped)
	case level == Error:
		found = finding(ConntrackFull, 35, Error, "raise the sysctl "+setting,
			"The connection tracking table is full: %d of %d entries; new connections fail", c.Count, c.Max)
	case level == Warning:
		found = finding(ConntrackFull, 35, Warning, "raise the sysctl "+setting,
			"The connection tracking table is nearly full: %d of %d entries; when it is, new connections "+
				"fail", c.Count, c.Max)
	default:
		return nil
	}
	return []Finding{found.
		seen(FromConntrack, time.Time{}, fmt.Sprintf("nf_conntrack_count %d, nf_conntrack_max %d",
			c.Count, c.Max)).
		try("sysctl net.netfilter.nf_conntrack_count "+setting,
			"sudo dmesg | grep 'nf_conntrack: table full'",
			fmt.Sprintf("sudo sysctl -w %s=%d", setting, 2*c.Max),
			fmt.Sprintf("echo %s=%d | sudo tee /etc/sysctl.d/90-conntrack.conf", setting, 2*c.Max))}
}

func noRoute(f Facts) (out []Finding) {
	for _, u := range f.NoRoute {
		if u.Count == 0 || len(u.Addrs) == 0 {
			continue
		}
		addrs := few(u.Addrs, someNames, func(a netip.Addr) string { return a.WithZone("").String() })
		if more := u.Count - len(u.Addrs); more > 0 && len(u.Addrs) <= someNames {
			addrs += safe(fmt.Sprintf(" and %d more", more))
		}
		next := "give the VM a route that covers them"
		if u.Family == iptables.IPv6 {
			next = "give the VM an external or internal IPv6 address (--stack-type=IPV4_IPV6), or a route"
		}
		found := finding(NoRoute, 36, Warning, next,
			"There is no %v route to %s, %d of %d services' addresses: connect fails before interception "+
				"(%s)", u.Family, addrs, u.Count, max(u.Of, u.Count), cmp.Or(u.Err, "no route")).
			under(u.Family.String()).try(routeTo(u.Addrs[0]))
		if u.Family == iptables.IPv6 {
			found = found.try(f.instance("describe", "--format='yaml(networkInterfaces)'"))
		}
		for _, a := range u.Addrs[:min(len(u.Addrs), someNames)] {
			found = found.seen(FromRoutes, time.Time{}, say("%v: %s", a.WithZone(""), u.Err))
		}
		out = append(out, found)
	}
	return out
}

func toolsMissing(f Facts) []Finding {
	if f.NoTools == nil {
		return nil
	}
	return []Finding{finding(ToolsMissing, 38, Error,
		"install the package iptables ("+howToInstall+"); nothing is intercepted until then",
		"There is no iptables on this VM: %v", f.NoTools).
		seen(FromKernel, time.Time{}, f.NoTools.Error()).
		try(installIPTables, "sudo systemctl restart service-proxy-bootstrap")}
}

// The package that has iptables and ip6tables: in words, and to paste.
const (
	howToInstall    = "`apt-get install iptables`, `dnf install iptables-nft`"
	installIPTables = "sudo sh -c 'apt-get update && apt-get install -y iptables || " +
		"dnf install -y iptables-nft'"
)

// failsTLS says that the control plane answers and its certificate is not believed, as with a wrong
// clock.
func failsTLS(f Facts) bool { return errors.Is(f.Envoy.Probe, envoyadmin.ErrTLS) }
