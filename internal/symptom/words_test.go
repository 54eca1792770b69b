package symptom

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/sockdiag"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// says: text is pattern, in which … stands for anything.
func says(text, pattern string) bool {
	parts := strings.Split(pattern, "…")
	for i, part := range parts {
		at := strings.Index(text, part)
		switch {
		case i == len(parts)-1 && i > 0:
			return strings.HasSuffix(text, part)
		case at < 0, i == 0 && at > 0:
			return false
		}
		text = text[at+len(part):]
	}
	return text == ""
}

// TestTidyShares: the evidence that facts hold stays as it is, since a bundle has two look at it at
// the same time.
func TestTidyShares(t *testing.T) {
	shared := []Evidence{{Text: "a\tb", Time: time.Now()}}
	was := slices.Clone(shared)
	f := Finding{Evidence: shared}
	tidy(&f)
	if f.Evidence[0].Text != "a b" || !slices.Equal(shared, was) {
		t.Errorf("have %q, and the shared is %q now", f.Evidence[0].Text, shared[0].Text)
	}
}

// TestWords: what a person must be able to read of each failure, written by hand from the list of
// what users of such systems meet, and not from the program. A finding is the first of its facts;
// cause and next step are what matters in them, … the words in between.
func TestWords(t *testing.T) {
	const cannot = "Cannot reach the Traffic Director API server: "
	port := func(purpose, addr string, owner uint32, name string) func(*Facts) {
		return func(f *Facts) {
			f.Ports = []Port{{Family: iptables.IPv4, Purpose: purpose, Addr: netip.MustParseAddrPort(addr),
				Owner: owner, OwnerName: name, Listening: true}}
		}
	}
	for _, tt := range []struct {
		when        string
		facts       Facts
		id          ID
		row         int
		severity    Severity
		cause, next string
	}{
		{"Envoy was stopped", live(func(f *Facts) { f.Envoy.Err = envoyadmin.ErrRefused }),
			"envoy-down", 1, Error, "Envoy is not running: nothing accepts on …127.0.0.1:15000", "…systemctl status service-proxy-envoy…envoy.err.log"},
		{"Envoy crashes again and again", live(func(f *Facts) {
			f.Envoy.Err, f.Envoy.Since, f.Envoy.LastError = envoyadmin.ErrRefused, now,
				"cannot bind '0.0.0.0:15001'"
			f.Envoy.Unit = "activating, auto-restart, exit code 1, 12 restarts"
		}), "envoy-down", 1, Error,
			"Envoy is not running: …since 2026-01-02T03:04:05Z…exit code 1…12 restarts…cannot bind '0.0.0.0:15001'", "…systemctl status service-proxy-envoy…"},
		{"no listener came", live(func(f *Facts) { f.Envoy.State, f.Envoy.Configured = "PRE_INITIALIZING", false }),
			"envoy-not-configured", 2, Error, "Envoy has not received its configuration…PRE_INITIALIZING…", "…gRPC config stream…envoy.err.log"},
		{"the name does not resolve", live(func(f *Facts) {
			f.Envoy.Stream = &Stream{Code: 13}
			f.Envoy.Probe = &envoyadmin.ProbeError{Step: envoyadmin.ErrLookUp,
				Target: "trafficdirector.googleapis.com", Err: errors.New("no such host")}
		}), "control-plane-look-up", 3, Error,
			cannot + "look up trafficdirector.googleapis.com: no such host", "…resolv.conf…DNS"},
		{"TCP 443 is blocked", live(func(f *Facts) {
			f.Envoy.Probe = &envoyadmin.ProbeError{Step: envoyadmin.ErrConnect,
				Target: "trafficdirector.googleapis.com:443", Err: os.ErrDeadlineExceeded}
		}), "control-plane-unreachable", 4, Error,
			cannot + "connect trafficdirector.googleapis.com:443: i/o timeout",
			"…firewall…TCP 443…Private Google Access…Cloud NAT…"},
		{"Envoy says nothing but that the stream ended", stream(13, ""),
			"control-plane-unreachable", 4, Error, cannot + "…trafficdirector.googleapis.com:443…code 13…", "…firewall…443…envoy.err.log"},
		{"nor to whom", with(stream(13, ""), func(f *Facts) { f.Envoy.Stream.Target = "" }),
			"control-plane-unreachable", 4, Error, cannot + "Envoy's stream ended with gRPC code 13…", "…firewall…443…envoy.err.log"},
		{"Envoy has no stream", live(func(f *Facts) { f.Envoy.Apart = true }),
			"control-plane-unreachable", 4, Error, cannot + "Envoy has no stream…", "…envoy.err.log"},
		{"the API is off", stream(7, "Traffic Director API has not been used in project 4711 before or it is disabled. Enable it by visiting https://console…"),
			"api-not-enabled", 5, Error, cannot + "…not enabled in project 4711", "…gcloud services enable trafficdirector.googleapis.com --project=4711"},
		{"no role", stream(7, "Permission denied on resource project 4711."),
			"permission-denied", 6, Error, cannot + "Permission denied on resource project 4711…7…",
			"grant roles/trafficdirector.client to web@my-project.iam.gserviceaccount.com"},
		{"no role, and nobody knows whose", with(stream(7, "Permission denied"), func(f *Facts) { f.Account, f.Scopes = "", nil }),
			"permission-denied", 6, Error, cannot + "Permission denied…", "grant roles/trafficdirector.client to …service account"},
		{"no role, without a word", stream(7, ""), "permission-denied", 6, Error, cannot + "gRPC code 7", "grant roles/trafficdirector.client to web@…"},
		{"no scope", with(stream(7, "Permission denied"), func(f *Facts) { f.Scopes = []string{} }),
			"scope-missing", 7, Error, cannot + "…web@my-project.iam.gserviceaccount.com…scope cloud-platform", "stop the VM, …--scopes=https://www.googleapis.com/auth/cloud-platform"},
		{"a network without a mesh", stream(5, `Traffic Director configuration was not found for network "prod" in project "4711".`),
			"configuration-not-found", 8, Error, cannot + `…not found for network "prod" in project "4711"…5…`, `…forwarding rule (INTERNAL_SELF_MANAGED)…mesh…"prod"…"4711"…`},
		{"the same by the product's new name", stream(5, `Cloud Service Mesh configuration was not found for network "prod" in project "4711".`),
			"configuration-not-found", 8, Error, cannot + `Cloud Service Mesh…network "prod" in project "4711"…`, `…INTERNAL_SELF_MANAGED…"prod"…"4711"…`},
		{"and without a network", stream(5, "Cloud Service Mesh configuration was not found."),
			"configuration-not-found", 8, Error, cannot + "Cloud Service Mesh configuration was not found…", "check the mesh, scope or network name…"},
		{"a wrong mesh", stream(5, "Requested entity was not found."),
			"configuration-not-found", 9, Error, cannot + "Requested entity was not found…5…", "check the mesh, scope or network name…gce-service-proxy…"},
		{"quota", stream(8, "Quota exceeded for quota metric"), "control-plane-refused", 0, Error, cannot + "Quota exceeded for quota metric…8…", "…envoy.err.log"},
		{"a bad listener", live(func(f *Facts) {
			f.Envoy.Rejected = []envoyadmin.Rejected{
				{Name: "front", Details: "duplicate address 0.0.0.0:15001"}}
		}), "listener-rejected", 10, Error,
			"Envoy rejected listener front: duplicate address 0.0.0.0:15001; …new…not intercepted", "…control plane"},
		{"an access log that cannot be written", live(func(f *Facts) {
			f.Envoy.Rejected = []envoyadmin.Rejected{
				{Name: "front", Details: "unable to open file '/data/access.log': Permission denied"}}
		}), "access-log-unwritable", 11, Error,
			"Envoy rejected listener front: …/data/access.log…Permission denied…new…not intercepted", "make /data/access.log writable by envoy …owns…"},
		{"iptables -D", family(func(f *Family) {
			f.By, f.Drift = "iptables (pid 4711)", []iptables.Drift{
				{Kind: iptables.JumpRemoved, Chain: "OUTPUT", Rule: "-p tcp -j SERVICE_PROXY_OUTPUT"}}
		}), "drift", 13, Warning,
			"IPv4 rules …by iptables (pid 4711): jump removed…OUTPUT…-p tcp -j SERVICE_PROXY_OUTPUT…", "repaired…"},
		{"iptables -F, and the kernel does not tell who", family(func(f *Family) {
			f.Family, f.Drift = iptables.IPv6,
				[]iptables.Drift{{Kind: iptables.ChainRemoved, Chain: "SERVICE_PROXY_OUTPUT"}}
		}), "drift", 13, Warning, "IPv6 rules were changed: chain removed (SERVICE_PROXY_OUTPUT)",
			"repaired…"},
		{"no user envoy", live(func(f *Facts) { f.UserErr = errors.New(`look up user "envoy": unknown user envoy`) }),
			"proxy-user", 15, Error, "No rules without the proxy's user…loop: …unknown user envoy", "create the user…--proxy-user"},
		{"ip6tables' modules are missing", family(func(f *Family) { f.Family, f.Unusable = iptables.IPv6, iptables.ErrNoTable }),
			"family-unusable", 16, Warning, "IPv6 interception is off: …no nat table", "IPv4 goes on; `modprobe ip6table_nat` or a reboot…"},
		{"ip6tables is not installed", family(func(f *Family) {
			f.Family, f.Unusable = iptables.IPv6, fmt.Errorf("find %q: %w", "ip6tables", iptables.ErrNoIPTables)
		}), "family-unusable", 16, Warning, "IPv6 interception is off: …iptables is not installed",
			"IPv4 goes on; install the package that has ip6tables (`apt-get install iptables`, `dnf install iptables-nft`)"},
		{"iptables' modules are missing", family(func(f *Family) { f.Unusable = iptables.ErrNoTable }),
			"family-unusable", 16, Error, "IPv4 interception is off: …no nat table", "`modprobe iptable_nat` or a reboot…"},
		{"and loading is off", family(func(f *Family) {
			f.Family = iptables.IPv6
			f.Unusable = fmt.Errorf("%w; %w: kernel.modules_disabled is set", iptables.ErrNoTable, iptables.ErrNoModules)
		}), "family-unusable", 16, Warning,
			"IPv6 interception is off: …no nat table; no module can be loaded before a reboot: kernel.modules_disabled is set",
			"IPv4 goes on; only a reboot brings it back: `modprobe` cannot"},
		{"an upgrade has taken iptables' modules away", family(func(f *Family) {
			f.Unusable = fmt.Errorf("%w; %w: /lib/modules/6.1.0-49 is not there", iptables.ErrNoTable, iptables.ErrNoModules)
		}), "family-unusable", 16, Error,
			"IPv4 interception is off: …no module can be loaded before a reboot: /lib/modules/6.1.0-49 is not there",
			"only a reboot brings it back: `modprobe` cannot"},
		{"a match that cannot be loaded before a reboot", family(func(f *Family) {
			f.Left = []iptables.RefusedError{{Rule: "-A X -m owner -j RETURN", Stderr: "Couldn't load match `owner'",
				NoModules: "no module can be loaded before a reboot: kernel.modules_disabled is set"}}
		}), "rules-not-applied", 17, Error,
			"The kernel refuses the IPv4 rule …`owner'; no module can be loaded before a reboot: kernel.modules_disabled is set",
			"only a reboot loads the match or target it names…"},
		{"none of the rules", family(func(f *Family) {
			f.Err = fmt.Errorf("%w; %w: kernel.modules_disabled is set", &iptables.RefusedError{Rule: "COMMIT"}, iptables.ErrNoModules)
		}), "rules-not-applied", 17, Error,
			"The IPv4 rules could not be applied: …; no module can be loaded before a reboot: kernel.modules_disabled is set",
			"only a reboot loads the match or table it names"},
		{"iptables -w", family(func(f *Family) { f.Err = iptables.ErrLocked }),
			"rules-not-applied", 17, Error, "The IPv4 rules could not be applied: …lock", "…tried again…/run/xtables.lock…"},
		{"nft wrote the table", family(func(f *Family) { f.Err = iptables.ErrIncompatible }),
			"rules-not-applied", 17, Error, "The IPv4 rules could not be applied: …incompatible", "…`nft list table ip nat`…"},
		{"nft wrote IPv6's table", family(func(f *Family) { f.Family, f.Err = iptables.IPv6, iptables.ErrIncompatible }),
			"rules-not-applied", 17, Error, "The IPv6 rules could not be applied: …incompatible", "…`nft list table ip6 nat`…"},
		{"no capability", family(func(f *Family) { f.Err = iptables.ErrNotRoot }),
			"rules-not-applied", 17, Error, "The IPv4 rules could not be applied: not permitted…", "run as root or with CAP_NET_ADMIN and CAP_NET_RAW"},
		{"anything else of iptables'", family(func(f *Family) {
			f.Err = &iptables.RefusedError{Family: iptables.IPv4, Line: 7, Rule: "-A X -m owner",
				Stderr: "Couldn't load match `owner'"}
		}), "rules-not-applied", 17, Error,
			"The IPv4 rules could not be applied: …-A X -m owner…Couldn't load match `owner'", "…tried again; `modprobe`…"},
		{"a match is missing, the rest is in", family(func(f *Family) {
			f.Left = []iptables.RefusedError{
				{Family: iptables.IPv4, Rule: "-A SERVICE_PROXY_INBOUND -m addrtype ! --dst-type LOCAL -j RETURN", Stderr: "Couldn't load match `addrtype'"}}
		}), "rules-not-applied", 17, Error,
			"The kernel refuses the IPv4 rule …-m addrtype ! --dst-type LOCAL…Couldn't load match `addrtype'", "`modprobe`…everything else is in place…"},
		{"comments are missing, and nothing else", family(func(f *Family) {
			f.Left = []iptables.RefusedError{
				{Family: iptables.IPv4, Rule: iptables.CommentMatch, Stderr: "Couldn't load match `comment'"}}
		}), "rules-not-applied", 17, Warning, "The kernel refuses the IPv4 rule …comment…",
			"`modprobe`…everything else is in place…"},
		{"iptables-save does not end", family(func(f *Family) { f.Err = iptables.ErrCouldNotLook }),
			"kernel-not-read", 17, Error, "The IPv4 rules could not be read: …", "…tried again…"},
		{"Docker's rule comes first", family(func(f *Family) {
			f.Shadow = []iptables.Drift{{Kind: iptables.Shadowed, Chain: "OUTPUT", Rule: "-p tcp -j DOCKER"}}
		}), "jump-shadowed", 18, Error, "…jump in OUTPUT…never reached…-p tcp -j DOCKER …before it…IPv4…",
			"take that rule out…"},
		{"firewalld fights", family(func(f *Family) {
			f.Fighting, f.Undone, f.By = true, 12, "firewalld (pid 4711)"
			f.Drift = []iptables.Drift{{Kind: iptables.JumpRemoved, Chain: "OUTPUT"}}
		}), "rules-undone", 18, Error,
			"The IPv4 …rules are undone again and again by firewalld (pid 4711)…12…", "stop that program…SERVICE_PROXY_*…"},
		{"somebody fights", family(func(f *Family) { f.Fighting, f.Undone = true, 12 }),
			"rules-undone", 18, Error, "The IPv4 …rules are undone again and again (12…", "stop that program…"},
		{"a serving port of which Envoy knows nothing", live(func(f *Facts) { f.Uncovered = []uint16{8080} }),
			"serving-port-not-inbound", 19, Warning, "Envoy has no inbound listener for port 8080 yet; …to the application directly", "…backend service…"},
		{"MySQL", live(func(f *Facts) { f.ServerFirst = []uint16{3306} }),
			"server-first-protocol", 22, Advice, "Port 3306 …server talks first…", "…exclude-outbound-port-ranges=3306"},
		{"Envoy 1.9.0", live(func(f *Facts) { f.Envoy.Version = envoyadmin.Version{Major: 1, Minor: 9} }),
			"envoy-too-old", 25, Error, "Envoy 1.9.0 is too old: 1.9.1…", "install Envoy 1.24.9 or newer"},
		{"Envoy 1.9.1", live(func(f *Facts) { f.Envoy.Version = envoyadmin.Version{Major: 1, Minor: 9, Patch: 1} }),
			"envoy-too-old", 25, Advice, "Envoy 1.9.1 is old", "install Envoy 1.24.9 or newer"},
		{"Envoy 1.24.8", live(func(f *Facts) { f.Envoy.Version = envoyadmin.Version{Major: 1, Minor: 24, Patch: 8} }),
			"envoy-too-old", 25, Advice, "Envoy 1.24.8 is old", "install Envoy 1.24.9 or newer"},
		{"Envoy 1.24.9", live(func(f *Facts) { f.Envoy.Version = envoyadmin.Version{Major: 1, Minor: 24, Patch: 9} }), "", 0, 0, "", ""},
		{"bootstrap failed", live(func(f *Facts) { f.Bootstrap = "install Envoy: no space left on device; make room on that disk" }),
			"bootstrap-failed", 26, Error, "Bootstrap failed: install Envoy: no space left on device; make room on that disk", ""},
		{"a slip in the attribute", live(func(f *Facts) { f.Attribute = malformed }),
			"attribute-malformed", 26, Error, "The gce-service-proxy attribute cannot be used: …service.serving-ports[0]: want a whole number, have a string", "correct it; …last good one…"},
		{"guest attributes are off", live(func(f *Facts) { f.GuestOff = true }),
			"guest-attributes-off", 27, Warning, "Guest attributes are disabled…", "…enable-guest-attributes=TRUE…"},
		{"another user on 15001", live(port("outbound interception", "127.0.0.1:15001", 4711, "mallory")),
			"port-foreign-owner", 32, Error, "Port 15001 (outbound interception) is held by mallory (uid 4711), not by the proxy's user envoy (uid 107): interception is off…",
			"…`ss -ltunp sport = :15001`…--proxy-user…"},
		{"a user without a name on IPv6's", live(port("inbound interception", "[::1]:15006", 4711, "")),
			"port-foreign-owner", 32, Error, "Port 15006 (inbound interception) is held by uid 4711, not…", "…sport = :15006…"},
		{"root on 15001", live(port("outbound interception", "127.0.0.1:15001", 0, "root")),
			"port-foreign-owner", 32, Error, "Port 15001 …root (uid 0), not…", "…sport = :15001…stop it; …published by a container…needs the VM's network instead"},
		{"root on 15000", live(port("admin", "127.0.0.1:15000", 0, "root")), "", 0, 0, "", ""},
		{"another user on 15000", live(port("admin", "127.0.0.1:15000", 4711, "")),
			"port-foreign-owner", 32, Error, "Port 15000 (admin) is held by uid 4711, not…", "…"},
		{"another user's admin socket", live(func(f *Facts) {
			f.Envoy.Admin, f.Ports = "unix:///run/envoy.sock",
				[]Port{{Purpose: "admin", Owner: 4711, OwnerName: "mallory", Listening: true}}
			f.Envoy.Err = &sockdiag.ForeignError{UID: 4711} // the same thing, once
		}), "port-foreign-owner", 32, Error,
			"Envoy's admin socket unix:///run/envoy.sock is held by mallory (uid 4711), not by the proxy's user envoy (uid 107)…", "…`ss -lxp`…--proxy-user…"},
		{"Envoy on its own port", live(port("outbound interception", "127.0.0.1:15001", 107, "envoy")), "", 0, 0, "", ""},
		{"Envoy's port does not accept", live(func(f *Facts) {
			f.Ports = []Port{
				{Family: iptables.IPv6, Purpose: "outbound interception", Addr: netip.MustParseAddrPort("[::1]:15001")}}
		}), "interception-port-closed", 0, Error,
			"Envoy's outbound interception port 15001 does not accept IPv6 connections (nothing accepts there)", "…envoy.err.log…"},
		{"nobody knows whether it does", live(func(f *Facts) {
			f.Ports = []Port{
				{Family: iptables.IPv4, Purpose: "DNS", Addr: netip.MustParseAddrPort("127.0.0.1:15053"), Err: errors.New("ask the kernel: no buffer")}}
		}), "interception-port-closed", 0, Error,
			"Envoy's DNS port 15053 does not accept IPv4 connections (ask the kernel: no buffer)", "…"},
		{"the admin port is closed, which envoy-down says", live(func(f *Facts) {
			f.Ports = []Port{{Purpose: "admin", Addr: netip.MustParseAddrPort("127.0.0.1:15000")}}
		}), "", 0, 0, "", ""},
		{"a container on a network of its own", live(func(f *Facts) {
			f.Envoy.Admin = "unix:///run/envoy/admin.sock"
			f.Ports = []Port{{Family: iptables.IPv4, Purpose: "outbound interception", Addr: netip.MustParseAddrPort("127.0.0.1:15001")}}
		}), "interception-port-closed", 0, Error,
			"Envoy's outbound interception port 15001 does not accept IPv4 connections (nothing accepts there)",
			"if Envoy runs in a container, give that the VM's network (--network host); else see /var/log/envoy/envoy.err.log for a bind error"},
		{"its admin interface in the container alone", live(func(f *Facts) {
			f.Envoy.Admin, f.Envoy.Err, f.Envoy.Unit = "unix:///run/envoy/admin.sock", envoyadmin.ErrRefused, NoUnit
		}), "envoy-down", 1, Error, "Envoy is not running: nothing accepts on its admin address unix:///run/envoy/admin.sock",
			"see how it is run, and …envoy.err.log; a container must share the folder of that socket"},
		{"a container on a network of its own, where nobody has a unit for it", live(func(f *Facts) { f.Envoy.Err, f.Envoy.Unit = envoyadmin.ErrRefused, NoUnit }),
			"envoy-down", 1, Error, "Envoy is not running: nothing accepts on its admin address 127.0.0.1:15000",
			"see how it is run, and …envoy.err.log; a container needs the VM's network (--network host)"},
		{"the same, and its unit runs", live(func(f *Facts) {
			f.Envoy.Admin, f.Envoy.Err, f.Envoy.Unit = "unix:///run/envoy/admin.sock", envoyadmin.ErrRefused, "active, running"
			f.Ports = []Port{{Family: iptables.IPv4, Purpose: "outbound interception", Addr: netip.MustParseAddrPort("127.0.0.1:15001"), Owner: f.ProxyUID, Listening: true}}
		}), "envoy-admin-unreadable", 0, Error, "Envoy serves, but nothing accepts on its admin address unix:///run/envoy/admin.sock; the rules stay as they are",
			"a container must share the folder of that socket; see …envoy.err.log for where Envoy has its own"},
		{"its socket is closed to the agent's user", live(func(f *Facts) {
			f.Envoy.Admin, f.Envoy.Err = "unix:///run/envoy/admin.sock", fmt.Errorf("%w: %w", envoyadmin.ErrConnection, fs.ErrPermission)
		}), "envoy-admin-unreadable", 0, Error, "Envoy's admin interface on unix:///run/envoy/admin.sock gives no usable answer: …permission denied",
			"the rules stay as they are; give the agent's user Envoy's group…mode 0660…"},
		{"half a dump", live(func(f *Facts) { f.Envoy.Err = envoyadmin.ErrNotJSON }),
			"envoy-admin-unreadable", 0, Error, "Envoy's admin interface on 127.0.0.1:15000 gives no usable answer: …", "the rules stay as they are…envoy.err.log…"},
		{"no answer", live(func(f *Facts) { f.Envoy.Err = envoyadmin.ErrTimeout }),
			"envoy-admin-unreadable", 0, Error, "Envoy's admin interface on 127.0.0.1:15000 gives no usable answer: …in time", "…main thread…the rules stay as they are…"},
		{"an answer without end", live(func(f *Facts) { f.Envoy.Err = envoyadmin.ErrTooLarge }),
			"envoy-admin-unreadable", 0, Error, "Envoy's admin interface on 127.0.0.1:15000 gives no usable answer: …too large", "the rules stay as they are…"},
		{"allow_paths", live(func(f *Facts) { f.Envoy.Err = envoyadmin.ErrForbiddenPath }),
			"envoy-admin-unreadable", 0, Error, "Envoy's admin interface on 127.0.0.1:15000 gives no usable answer: …forbids…", "…/config_dump, /server_info, /ready, /stats and /clusters…allow_paths…"},
		{"named as bind", live(func(f *Facts) {
			f.Resolvers = []Port{
				{Addr: netip.MustParseAddrPort("127.0.0.1:53"), Owner: 110, OwnerName: "bind", Listening: true}}
		}), "resolver-loop", 42, Warning,
			"…127.0.0.1:53 of bind (uid 110) go to Envoy's DNS listener…if …in a circle", "if so, name bind in --resolver-users, together with…"},
		{"an nft chain before ours", live(func(f *Facts) {
			f.Others = []iptables.OtherChain{
				{Backend: "nft", Family: "inet", Table: "mine", Chain: "out", Hook: iptables.Output, Priority: -110}}
		}), "other-nat-chain", 34, Advice, "…inet mine out…output…-110", "…nft list ruleset…"},
		{"a listener for the metadata server", live(func(f *Facts) {
			f.Refused = []Refusal{
				{Listener: "front", Entry: "169.254.169.254/32", Reason: "it is link-local"}}
		}), "listener-entry-refused", 0, Warning,
			"Listener front asks for 169.254.169.254/32, which is never intercepted: it is link-local", "…control plane"},
		{"a listener on a pipe", live(func(f *Facts) {
			f.Envoy.Skipped = []envoyadmin.Skipped{{Listener: "front", Reason: "its address is a pipe"}}
		}),
			"listener-not-intercepted", 0, Warning, "Listener front is not intercepted: its address is a pipe", ""},
		{"Envoy was started by root", live(func(f *Facts) {
			port("outbound interception", "0.0.0.0:15001", 0, "root")(f)
			f.Processes = []uint32{0}
		}), "envoy-other-user", 15, Error,
			"Envoy runs as root (uid 0)…envoy (uid 107)…come back to it…interception is off", "run Envoy as envoy…--proxy-user cannot be root; ports that a container publishes…"},
		{"by a user without a name", live(func(f *Facts) {
			port("outbound interception", "0.0.0.0:15001", 4711, "")(f)
			f.Processes = []uint32{4711, 4711, 107}
		}), "envoy-other-user", 15, Error, "What answers as Envoy runs as uid 4711, …envoy (uid 107)…", "look who that is…only if 4711 is meant…--proxy-user=4711…"},
		{"its own user, and nobody else", live(func(f *Facts) { f.Processes = []uint32{107} }), "", 0, 0, "", ""},
		{"iptables -F, and the agent is stopped", live(func(f *Facts) {
			f.Differ = []iptables.Drift{{Kind: iptables.TableFlushed, Chain: "nat"}}
		}), "rules-differ", 13, Error, "The kernel's rules are not what Envoy needs…no agent repairs them: 1 difference: table flushed: nat",
			"start the agent…systemctl start service-proxy-agent…service-proxy-agent diff…"},
		{"several chains of ours are gone", live(func(f *Facts) {
			f.Differ = []iptables.Drift{{Kind: iptables.ChainRemoved, Chain: "SERVICE_PROXY_DNS"}, {}, {}}
		}), "rules-differ", 13, Error, "…3 differences, the first: chain removed: SERVICE_PROXY_DNS", "start the agent…"},
		{"iptables -A INPUT -p tcp --dport 8080 -j DROP", live(func(f *Facts) {
			f.Dropped = []Dropped{{Family: iptables.IPv4, Port: 8080, At: 8080, Chain: "INPUT", Rule: "-p tcp -m tcp --dport 8080 -j DROP"}}
		}), "serving-port-dropped", 20, Warning,
			"IPv4 …serving port 8080 is dropped by the rule -A INPUT -p tcp -m tcp --dport 8080 -j DROP of table filter", "let TCP 8080 in before that rule…"},
		{"ufw's chain, of a port that is redirected", live(func(f *Facts) {
			f.Dropped = []Dropped{{Family: iptables.IPv6, Port: 80, At: 15006, Chain: "ufw6-user-input", Rule: "-j REJECT"}}
		}), "serving-port-dropped", 20, Warning,
			"IPv6 …serving port 80 …-A ufw6-user-input -j REJECT…Envoy's port 15006…", "let TCP 15006 in…"},
		{"iptables -P INPUT DROP", live(func(f *Facts) {
			f.Dropped = []Dropped{{Family: iptables.IPv4, Port: 80, Chain: "INPUT"}}
		}), "serving-port-dropped", 20, Warning, "IPv4 …80 …by the policy -P INPUT DROP of table filter", "let TCP 80 in before that policy…"},
		{"ufw, which drops what containers send to Envoy", live(func(f *Facts) {
			f.Dropped = []Dropped{{Family: iptables.IPv4, Interface: "docker0", At: 15001, Chain: "INPUT"}}
		}), "serving-port-dropped", 20, Warning,
			"IPv4 connections to services from docker0…Envoy's port 15001…by the policy -P INPUT DROP of table filter",
			"let TCP 15001 in from docker0 before that policy"},
		{"the application was stopped", live(func(f *Facts) { f.Silent = []uint16{8080} }),
			"application-silent", 21, Warning, "The application is not listening on 8080…", "start it…serving-ports…"},
		{"four of five endpoints fail", live(func(f *Facts) { f.Clusters = manyClusters(1, 1) }),
			"endpoints-panic", 24, Warning, "…cluster cluster-000 (1 of 5 healthy)…ignores health…", "…health checks…firewall…"},
		{"half fail, and Envoy's counter moves", live(func(f *Facts) {
			f.Clusters = []Cluster{{ClusterHealth: envoyadmin.ClusterHealth{Name: "web", Total: 4, Healthy: 2}, Panic: true}}
		}), "endpoints-panic", 24, Warning, "…cluster web (2 of 4 healthy)…", "…"},
		{"one of five fails", live(func(f *Facts) { f.Clusters = manyClusters(1, 4) }),
			"endpoints-unhealthy", 31, Advice, "…cluster cluster-000 (4 of 5 healthy)…leave its zone…", "…health checks…"},
		{"one of five fails in many clusters", live(func(f *Facts) { f.Clusters = manyClusters(500, 4) }),
			"endpoints-unhealthy", 31, Advice, "…cluster-000 (4 of 5 healthy), cluster cluster-001 …cluster-002 (4 of 5 healthy) and 497 more: …", "…"},
		{"all are healthy", live(func(f *Facts) { f.Clusters = manyClusters(3, 5) }), "", 0, 0, "", ""},
		{"a cluster without endpoints", live(func(f *Facts) { f.Clusters = []Cluster{{}} }), "", 0, 0, "", ""},
		{"kill -STOP", live(func(f *Facts) { f.Agent = Agent{Heartbeat: now, Now: now.Add(5*time.Minute + time.Second)} }),
			"agent-stuck", 28, Error, "The agent is stuck: its last heartbeat is of 2026-01-02T03:04:05Z, 5m1s ago", "…watchdog…systemctl restart service-proxy-agent…"},
		{"a heartbeat of five minutes ago", live(func(f *Facts) { f.Agent = Agent{Heartbeat: now, Now: now.Add(5 * time.Minute)} }), "", 0, 0, "", ""},
		{"the watchdog", live(func(f *Facts) { f.Agent.Killed = now }),
			"agent-stuck", 28, Warning, "An earlier run …hung and was restarted …2026-01-02T03:04:05Z", "the journal has the stack…"},
		{"a bootstrap by hand, of another network", with(stream(5, "no"), presents("123456789012", "prod")),
			"envoy-identity", 29, Error, `Envoy presents …network "prod", where this VM's is "default" (node projects/123456789012/networks/prod/nodes/7f0c)`, "correct node.id…"},
		{"of another project and no network", with(stream(5, "no"), presents("4711", "")),
			"envoy-identity", 29, Error, `Envoy presents …no network, where this VM's is "default", and project "4711", where this VM's is "123456789012"…`, "correct node.id…"},
		{"of another network, and it works", live(presents("123456789012", "prod")),
			"envoy-identity", 29, Warning, `Envoy presents …network "prod"…"default"…`, "if that is not meant: correct node.id…"},
		{"as it should be", live(presents("123456789012", "default")), "", 0, 0, "", ""},
		{"what the VM's is is not known", live(func(f *Facts) {
			presents("4711", "prod")(f)
			f.Node = &Node{}
		}), "", 0, 0, "", ""},
		{"a clock in the future", live(func(f *Facts) { f.Clock = 5*time.Minute + time.Second }),
			"clock-wrong", 30, Error, "The clock of this VM is 5m1s ahead of the metadata server's…TLS…heartbeat…", "…NTP…chronyc makestep…"},
		{"a clock in the past", live(func(f *Facts) { f.Clock = -5 * time.Minute }),
			"clock-wrong", 30, Warning, "The clock of this VM is 5m0s behind the metadata server's…", "…NTP…"},
		{"half a minute", live(func(f *Facts) { f.Clock = -30 * time.Second }), "", 0, 0, "", ""},
		{"a stream from before the rules", live(func(f *Facts) {
			f.Old = []OldConnection{{From: netip.MustParseAddrPort("10.128.0.5:41000"), To: netip.MustParseAddrPort("10.0.0.1:80"), UID: 33}}
		}), "old-connections", 33, Advice, "A connection from before the rules…10.128.0.5:41000 to 10.0.0.1:80 (uid 33)", "it ends by itself…"},
		{"more than are named", live(func(f *Facts) { f.Old, f.OldCount = make([]OldConnection, 20), 5000 }),
			"old-connections", 33, Advice, "5000 connections from before the rules…, and 4997 more", "they end by themselves…"},
		{"many", live(func(f *Facts) { f.Old = make([]OldConnection, 7) }),
			"old-connections", 33, Advice, "7 connections …and 4 more", "they end by themselves…"},
		{"90 % of conntrack", live(func(f *Facts) { f.Conntrack = Conntrack{Count: 900, Max: 1000} }),
			"conntrack-full", 35, Warning, "…nearly full: 900 of 1000 entries…", "…net.netfilter.nf_conntrack_max"},
		{"89 %", live(func(f *Facts) { f.Conntrack = Conntrack{Count: 899, Max: 1000} }), "", 0, 0, "", ""},
		{"no conntrack", live(func(f *Facts) { f.Conntrack = Conntrack{} }), "", 0, 0, "", ""},
		{"all of it", live(func(f *Facts) { f.Conntrack = Conntrack{Count: 1000, Max: 1000} }),
			"conntrack-full", 35, Error, "…is full: 1000 of 1000 entries; new connections fail", "…net.netfilter.nf_conntrack_max"},
		{"it was full", live(func(f *Facts) { f.Conntrack = Conntrack{Count: 700, Max: 1000, Dropped: 3} }),
			"conntrack-full", 35, Error, "…full: 700 of 1000 entries…3 packets were dropped…", "…net.netfilter.nf_conntrack_max"},
		{"no IPv6 on the VM", live(func(f *Facts) {
			f.NoRoute = []Unrouted{{Family: iptables.IPv6, Addrs: []netip.Addr{netip.MustParseAddr("fd10::1")}, Count: 4, Of: 9, Err: "network is unreachable"}, {Family: iptables.IPv4}}
		}), "no-route", 36, Warning, "There is no IPv6 route to fd10::1 and 3 more, 4 of 9 …connect fails before interception (network is unreachable)", "…IPv6 address…route"},
		{"nor a default route", live(func(f *Facts) {
			f.NoRoute = []Unrouted{{Family: iptables.IPv4, Count: 1, Of: 1,
				Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}}
		}), "no-route", 36, Warning, "There is no IPv4 route to 10.0.0.1, 1 of 1 …", "…route…"},
		{"somebody's Envoy", live(func(f *Facts) {
			f.Configured = &EnvoyConfig{NodeID: "projects/1/networks/default/nodes/a", Targets: []string{"trafficdirector.googleapis.com:443"}}
			f.Running = &EnvoyConfig{NodeID: "projects/1/networks/default/nodes/a", Targets: []string{"xds.example.com:18000"}}
		}), "envoy-not-as-configured", 37, Error,
			"…control plane is xds.example.com:18000, and trafficdirector.googleapis.com:443 was configured", "stop the other Envoy…"},
		{"an old one of our own", live(func(f *Facts) {
			f.Configured, f.Running = &EnvoyConfig{NodeID: "a", Targets: []string{"x", "y"}}, &EnvoyConfig{NodeID: "b", Targets: []string{"y", "x"}}
		}), "envoy-not-as-configured", 37, Error, `…: its node is "b", and "a" was configured`, "…"},
		{"without a control plane", live(func(f *Facts) {
			f.Configured, f.Running = &EnvoyConfig{Targets: []string{"x"}}, &EnvoyConfig{}
		}), "envoy-not-as-configured", 37, Error, "…control plane is none, and x was configured", "…"},
		{"ours", live(func(f *Facts) {
			f.Configured, f.Running = &EnvoyConfig{NodeID: "a", From: "file"}, &EnvoyConfig{NodeID: "a", From: "pid 1"}
		}), "", 0, 0, "", ""},
		{"apt-get failed", live(func(f *Facts) { f.NoTools = errors.New("apt-get: E: Unable to locate package iptables") }),
			"iptables-missing", 38, Error, "There is no iptables on this VM: apt-get: E: Unable to locate package iptables", "install the package iptables (`apt-get install iptables`…"},
		{"503", live(func(f *Facts) { f.Metadata = errors.New("status 503 Service Unavailable") }),
			"metadata-server", 0, Error, "The metadata server gives no usable answer about the attribute: status 503 Service Unavailable", "…the last good one stays in force…169.254.169.254…"},
		{"somebody forgot --service-proxy-agent-location", live(func(f *Facts) {
			f.ClosedAgent = &ClosedAgent{Unit: "/etc/systemd/system/service-proxy-agent.service, active", Starts: true,
				Process: "4711 /usr/local/bin/other"}
		}), "closed-agent", 39, Error, "Google's own agent is on this VM, too, and writes the same rules…4711 /usr/local/bin/other",
			"`sudo service-proxy-agent bootstrap --take-over`…--remove…"},
		{"it has no unit that systemd knows", live(func(f *Facts) { f.ClosedAgent = &ClosedAgent{Process: "4711 other"} }),
			"closed-agent", 39, Error, "Google's own agent is on this VM…4711 other", "…--take-over…"},
		{"it starts at the next boot", live(func(f *Facts) { f.ClosedAgent = &ClosedAgent{Unit: "/a.service, enabled", Starts: true} }),
			"closed-agent", 39, Error, "Google's own agent is on this VM…/a.service, enabled", "…--take-over…"},
		{"its unit is disabled", live(func(f *Facts) { f.ClosedAgent = &ClosedAgent{Unit: "/a.service, disabled", Binary: "/b"} }),
			"closed-agent", 39, Warning, "Google's own agent is installed…does not run: /a.service, disabled", "remove it…--take-over…"},
		{"its binary lies there", live(func(f *Facts) { f.ClosedAgent = &ClosedAgent{Binary: "/b"} }),
			"closed-agent", 39, Warning, "Google's own agent is installed…does not run: /b", "remove it…"},
		{"somebody writes our guest attributes", live(func(f *Facts) { f.ClosedAgent = &ClosedAgent{Writes: "agent-heartbeat"} }),
			"closed-agent", 39, Warning, "…agent-heartbeat", "…"},
		{"a cloned disk", live(func(f *Facts) {
			f.Discarded = &Discarded{Instance: "11", This: "22", What: []string{"the attribute", "the history"}, At: now}
		}), "state-of-another-vm", 40, Advice,
			"State of another VM (instance 11) was found at the start and discarded, since this VM is 22: the attribute and the history", "nothing to do…--prepare-image…"},
		{"of whom nothing is known", live(func(f *Facts) { f.Discarded = &Discarded{} }),
			"state-of-another-vm", 40, Advice, "State of another VM (instance unknown)…this VM is another one: all of it", "nothing to do…"},
		{"the brake of a project", live(func(f *Facts) { f.Brake = Brake{Off: true, Since: now, By: "project"} }),
			"interception-off", 41, Warning, "Interception is off since 2026-01-02T03:04:05Z, as intended: the project's metadata has service-proxy-agent-interception=off…past Envoy",
			"to end it: gcloud compute project-info remove-metadata --project=my-project --keys=service-proxy-agent-interception"},
		{"the brake of a VM, which doctor sees without a daemon", live(func(f *Facts) { f.Brake = Brake{Off: true, By: "instance"} }),
			"interception-off", 41, Warning, "Interception is off, as intended: this VM's metadata has service-proxy-agent-interception=off…",
			"to end it: gcloud compute instances remove-metadata web-1 --zone=europe-west1-b --project=my-project --keys=service-proxy-agent-interception"},
		{"bypass-when-down", live(func(f *Facts) { f.Brake = Brake{WhenEnvoyDown: true, By: "project"} }), "", 0, 0, "", ""},
		{"OFF!", live(func(f *Facts) { f.Brake = Brake{Bad: "OFF!", BadBy: "instance"} }),
			"interception-key", 41, Warning, `The brake service-proxy-agent-interception="OFF!" of this VM's metadata is neither off nor bypass-when-down`, "write off or bypass-when-down…nothing is changed"},
		{"chmod", live(func(f *Facts) { f.Envoy.LogErr = "open /var/log/envoy/envoy.err.log: permission denied" }),
			"envoy-log-unreadable", 0, Warning, "Envoy's log cannot be read: open /var/log/envoy/envoy.err.log: permission denied", "have Envoy write it there, readable for the agent's user…"},
		{"its container does not share it", live(func(f *Facts) { f.Envoy.LogErr = "open /var/log/envoy/envoy.log: no such file or directory" }),
			"envoy-log-unreadable", 0, Warning, "Envoy's log cannot be read: open /var/log/envoy/envoy.log: no such file or directory", "…from a container, in a folder that it shares…"},
		{"serving port 22", live(func(f *Facts) { f.Advice = []string{"service.serving-ports: 22 sends SSH through Envoy"} }),
			"attribute-advice", 0, Warning, "The gce-service-proxy attribute: service.serving-ports: 22 sends SSH through Envoy", "…docs/attribute.md"},
		{"another program on 15020, and metrics elsewhere", live(func(f *Facts) {
			f.ListenErr, f.MetricsApart = errors.New("listen tcp :15020: address already in use"), true
		}),
			"listen-address", 0, Warning, "/healthz is not served: listen tcp :15020: address already in use", "…--listen…interception goes on"},
		{"a broken web config file", live(func(f *Facts) { f.MetricsErr = errors.New(`web config file "/w.yml": line 3`) }),
			"listen-address", 0, Warning, `/metrics is not served as it should be: web config file "/w.yml": line 3`, "it is tried again…interception goes on"},
		{"another program on 15020", live(func(f *Facts) { f.ListenErr = errors.New("listen tcp :15020: address already in use") }),
			"listen-address", 0, Warning, "/healthz and /metrics are not served: listen tcp :15020: address already in use", "…--listen…interception goes on"},
	} {
		findings := Check(tt.facts)
		for _, found := range findings {
			isKind(t, found)
		}
		if tt.id == "" {
			if len(findings) > 0 {
				t.Errorf("%s: %+v, want nothing", tt.when, findings)
			}
			continue
		}
		// Envoy's missing configuration is listed under its cause; no other finding may come along.
		if len(findings) == 0 || len(slices.DeleteFunc(slices.Clone(findings), func(f Finding) bool {
			return f.ExplainedBy != ""
		})) != 1 {
			t.Errorf("%s: %+v, want one finding", tt.when, findings)
			continue
		}
		f := findings[0]
		if f.ID != tt.id || f.Row != tt.row || f.Severity != tt.severity || !says(f.Cause, tt.cause) ||
			!says(f.Next, tt.next) {
			t.Errorf("%s:\nhave %s, row %d, %v: %s; %s\nwant %s, row %d, %v: %s; %s", tt.when,
				f.ID, f.Row, f.Severity, f.Cause, f.Next, tt.id, tt.row, tt.severity, tt.cause, tt.next)
		}
		if want := f.Cause + "; " + f.Next; f.Next != "" && f.Text() != want ||
			f.Next == "" && f.Text() != f.Cause {
			t.Errorf("%s: the line is %q", tt.when, f.Text())
		}
	}
}

// TestSilentUntilBootstrapped: while bootstrap is under way, what it has not come to yet is no
// failure; the rest is.
func TestSilentUntilBootstrapped(t *testing.T) {
	awaited := []ID{"envoy-down", "proxy-user", "family-unusable", "envoy-not-configured",
		"envoy-identity", "envoy-not-as-configured", "iptables-missing"}
	for _, e := range examples {
		f := e.facts
		f.Bootstrapping = true
		found := slices.ContainsFunc(Check(f), func(f Finding) bool { return f.ID == e.want })
		if e.want != "" && found == slices.Contains(awaited, e.want) {
			t.Errorf("%s, while bootstrap is under way: %+v", e.when, Check(f))
		}
	}
}

// TestFollows: what follows from another finding is listed under it, and counted with it.
func TestFollows(t *testing.T) {
	closed := func(f *Facts) {
		f.Ports = append(f.Ports, Port{Family: iptables.IPv4, Purpose: "outbound interception",
			Addr: netip.MustParseAddrPort("127.0.0.1:15001")})
	}
	foreign := func(f *Facts) {
		f.Ports = append(f.Ports, Port{Family: iptables.IPv4, Purpose: "inbound interception",
			Addr: netip.MustParseAddrPort("127.0.0.1:15006"), Owner: 4711, Listening: true})
	}
	uncovered := func(f *Facts) { f.Uncovered = []uint16{8080} }
	unconfigured := func(f *Facts) { f.Envoy.State, f.Envoy.Configured = "PRE_INITIALIZING", false }
	refused := func(code int, message string) func(*Facts) {
		return func(f *Facts) { unconfigured(f); f.Envoy.Stream = &Stream{Code: code, Message: message} }
	}
	rejected := func(details string) func(*Facts) {
		return func(f *Facts) { f.Envoy.Rejected = []envoyadmin.Rejected{{Name: "l", Details: details}} }
	}
	probe := func(step error) func(*Facts) {
		return func(f *Facts) {
			f.Envoy.Probe = &envoyadmin.ProbeError{Step: step, Err: errors.New("no")}
		}
	}
	down := func(f *Facts) { f.Envoy.Err = envoyadmin.ErrRefused }
	for _, tt := range []struct {
		name  string
		facts []func(*Facts)
		want  string // finding<its reason, worst first
	}{
		{"Envoy is down", []func(*Facts){down, closed, uncovered}, "envoy-down interception-port-closed<envoy-down serving-port-not-inbound<envoy-down"},
		{"another user came instead", []func(*Facts){foreign, closed, uncovered},
			"port-foreign-owner interception-port-closed<port-foreign-owner serving-port-not-inbound<port-foreign-owner"},
		{"another user, and Envoy is down", []func(*Facts){down, foreign, closed}, "port-foreign-owner envoy-down interception-port-closed<port-foreign-owner"},
		{"nothing says why", []func(*Facts){unconfigured, closed, uncovered}, "envoy-not-configured interception-port-closed serving-port-not-inbound"},
		{"DNS", []func(*Facts){unconfigured, probe(envoyadmin.ErrLookUp), closed},
			"control-plane-look-up envoy-not-configured<control-plane-look-up interception-port-closed<control-plane-look-up"},
		{"firewall", []func(*Facts){unconfigured, probe(envoyadmin.ErrConnect)}, "control-plane-unreachable envoy-not-configured<control-plane-unreachable"},
		{"API", []func(*Facts){refused(7, "has not been used in project 1 before or it is disabled")}, "api-not-enabled envoy-not-configured<api-not-enabled"},
		{"role", []func(*Facts){refused(7, "no"), uncovered},
			"permission-denied envoy-not-configured<permission-denied serving-port-not-inbound<permission-denied"},
		{"scope", []func(*Facts){refused(7, "no"), func(f *Facts) { f.Scopes = []string{} }}, "scope-missing envoy-not-configured<scope-missing"},
		{"mesh", []func(*Facts){refused(5, "no")}, "configuration-not-found envoy-not-configured<configuration-not-found"},
		{"quota", []func(*Facts){refused(8, "no")}, "control-plane-refused envoy-not-configured<control-plane-refused"},
		{"a bad listener", []func(*Facts){unconfigured, rejected("no"), closed},
			"listener-rejected envoy-not-configured<listener-rejected interception-port-closed<listener-rejected"},
		{"access log", []func(*Facts){unconfigured, rejected("unable to open file '/a': no")}, "access-log-unwritable envoy-not-configured<access-log-unwritable"},
		{"two reasons", []func(*Facts){refused(7, "no"), rejected("no")}, "permission-denied listener-rejected envoy-not-configured<permission-denied"},
		// Without an answer of Envoy's, or while it drains, nothing is known of its configuration.
		{"Envoy is down and was never configured", []func(*Facts){unconfigured, down}, "envoy-down"},
		{"no answer yet", []func(*Facts){unconfigured, func(f *Facts) { f.Envoy.State = "" }}, ""},
		{"it drains", []func(*Facts){unconfigured, func(f *Facts) { f.Envoy.State = "DRAINING" }}, ""},
		{"without the proxy's user nobody is a foreign owner", []func(*Facts){foreign, func(f *Facts) { f.UserErr = errors.New("no") }}, "proxy-user"},
		// An error that another explains is an error still; of one rank, the checks'
		// order, the same each time.
		{"worst first", []func(*Facts){down, closed, func(f *Facts) {
			f.Uncovered, f.GuestOff, f.ServerFirst = []uint16{8080, 80}, true, []uint16{25, 21}
		}}, "envoy-down interception-port-closed<envoy-down guest-attributes-off serving-port-not-inbound<envoy-down serving-port-not-inbound<envoy-down " +
			"server-first-protocol server-first-protocol"},
	} {
		f := live(nil)
		for _, change := range tt.facts {
			change(&f)
		}
		var have []string
		for _, found := range Check(f) {
			have = append(have, strings.TrimSuffix(string(found.ID)+"<"+string(found.ExplainedBy), "<"))
		}
		if got := strings.Join(have, " "); got != tt.want {
			t.Errorf("%s:\nhave %s\nwant %s", tt.name, got, tt.want)
		}
	}
	var keys []string
	for _, found := range Check(live(func(f *Facts) { f.Uncovered = []uint16{8080, 80} })) {
		keys = append(keys, found.Key)
	}
	if got := strings.Join(keys, " "); got != "8080 80" {
		t.Errorf("two of one kind come as %s, want them as they were found", got)
	}
}

// TestLeftOut: of many rules that lack one match, one line is said; each other rule has its own.
func TestLeftOut(t *testing.T) {
	left := func(rules ...string) (texts []string) {
		for _, f := range Check(family(func(f *Family) {
			for _, rule := range rules {
				f.Left = append(f.Left, iptables.RefusedError{Family: iptables.IPv4, Rule: rule, Stderr: "no"})
			}
		})) {
			texts = append(texts, f.Severity.String()+" "+f.Cause)
		}
		return texts
	}
	for _, tt := range []struct {
		rules []string
		want  int
	}{
		{nil, 0},
		{[]string{iptables.CommentMatch}, 1},
		{[]string{iptables.CommentMatch, iptables.CommentMatch, iptables.CommentMatch}, 1},
		{[]string{"-A A", "-A B"}, 2},
		{[]string{"-A A", "-A B", iptables.CommentMatch, iptables.CommentMatch}, 3},
	} {
		if have := left(tt.rules...); len(have) != tt.want {
			t.Errorf("%q: %q, want %d lines", tt.rules, have, tt.want)
		}
	}
}

// TestSeverityText: what `status -o json` writes, `status` reads.
func TestSeverityText(t *testing.T) {
	for severity, text := range map[Severity]string{Advice: `"advice"`, Warning: `"warning"`,
		Error: `"error"`} {
		have, err := json.Marshal(severity)
		back := (severity + 1) % 3
		if err := errors.Join(err, json.Unmarshal([]byte(text), &back)); err != nil ||
			string(have) != text || back != severity {
			t.Errorf("%v: %s, back %v, %v", severity, have, back, err)
		}
	}
	var f Finding
	if err := json.Unmarshal([]byte(`{"id": "x", "severity": "fatal"}`), &f); err != nil ||
		f.ID != "x" {
		t.Errorf("a severity of a newer agent's: %+v, %v", f, err)
	}
}
