//go:build lab

package e2e

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/service-proxy-agent/service-proxy-agent/internal/status"
	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
	"github.com/service-proxy-agent/service-proxy-agent/test/controlplane"
	"github.com/service-proxy-agent/service-proxy-agent/test/lab"
	"github.com/service-proxy-agent/service-proxy-agent/test/mesh"
	"github.com/service-proxy-agent/service-proxy-agent/test/platform"
)

// situations are the VMs, with what is injected in each. They stand beside each other, so a VM has
// as few as fit into a minute or two.
var situations = []situation{
	{"Envoy", healthyVM, []injection{
		{row: 1, id: symptom.EnvoyDown, how: "kill -9 of Envoy", inject: envoyKilled, disturbs: true,
			says: `^Envoy is not running: nothing accepts on its admin address 127\.0\.0\.1:15000 since \S+Z` +
				`.*; see .systemctl status service-proxy-envoy. and /\S+/envoy\.err\.log`},
		{row: 32, id: symptom.ForeignOwner, how: "uid 4711 listens on Envoy's ports", inject: portsTaken,
			disturbs: true, beside: []symptom.ID{symptom.InterceptionNotReady},
			says: `^Port 15\d+ \(.*\) is held by uid 4711, not by the proxy's user .*` +
				`; find it with .ss -ltunp sport = :15\d+. and stop it`},
	}},
	{"no role", healthyVM, []injection{
		{row: 6, id: symptom.PermissionDenied, how: "stream closed: 7, Permission denied",
			inject: roleMissing,
			says: `^Cannot reach the Traffic Director API server: Permission denied on resource project .*` +
				`\(gRPC code 7\); grant roles/trafficdirector\.client to \S+gserviceaccount\.com`},
		{row: 5, id: symptom.APINotEnabled, how: "stream closed: 7, API has not been used in project",
			inject: ends(func(cp *controlplane.Server) { cp.RefuseDisabled("123456789012") }),
			says: `^Cannot reach the Traffic Director API server: the API is not enabled in project ` +
				`123456789012; enable it: gcloud services enable trafficdirector\.googleapis\.com --project=123456789012`},
	}},
	{"no scope", vmWithoutScope, []injection{
		{row: 7, id: symptom.ScopeMissing, how: "the VM's scopes lack cloud-platform, code 7",
			inject: ends((*controlplane.Server).RefusePermission),
			says: `^Cannot reach the Traffic Director API server: the VM's service account \S+ lacks the ` +
				`scope cloud-platform; stop the VM, then gcloud compute instances set-service-account`},
	}},
	{"quota", healthyVM, []injection{
		{row: 0, id: symptom.ControlPlaneRefused, how: "stream closed: 8, Quota exceeded",
			inject: ends(func(cp *controlplane.Server) {
				cp.Refuse(codes.ResourceExhausted, "Quota exceeded.")
			}), // which Envoy hopes will pass, and logs after 30 s
			late: 90 * time.Second,
			says: `^Cannot reach the Traffic Director API server: Quota exceeded \(gRPC code 8\); see`},
	}},
	{"no configuration", healthyVM, []injection{
		{row: 8, id: symptom.ConfigNotFound, how: "Traffic Director configuration was not found, network",
			inject: ends(func(cp *controlplane.Server) { cp.RefuseNotFound("default", "my-project") }),
			says: `^Cannot reach the Traffic Director API server: Traffic Director configuration was not ` +
				`found for network "default" in project "my-project" \(gRPC code 5\); create a forwarding rule`},
		{row: 8, id: symptom.ConfigNotFound, how: "Cloud Service Mesh configuration was not found, network",
			inject: notFound(`Cloud Service Mesh configuration was not found for network "default" in project "my-project".`),
			says: `^Cannot reach the Traffic Director API server: Cloud Service Mesh configuration was not ` +
				`found for network "default" in project "my-project" \(gRPC code 5\); create a forwarding rule`},
	}},
	{"no configuration, no network", healthyVM, []injection{
		{row: 8, id: symptom.ConfigNotFound, how: "Traffic Director configuration was not found",
			inject: notFound("Traffic Director configuration was not found."),
			says: `^Cannot reach the Traffic Director API server: Traffic Director configuration was not ` +
				`found \(gRPC code 5\); check the mesh, scope or network name`},
		{row: 8, id: symptom.ConfigNotFound, how: "Cloud Service Mesh configuration was not found",
			inject: notFound("Cloud Service Mesh configuration was not found."),
			says: `^Cannot reach the Traffic Director API server: Cloud Service Mesh configuration was not ` +
				`found \(gRPC code 5\); check the mesh, scope or network name`},
		{row: 9, id: symptom.ConfigNotFound, how: "stream closed: 5, Requested entity was not found",
			inject: ends((*controlplane.Server).RefuseUnknownEntity),
			says: `^Cannot reach the Traffic Director API server: Requested entity was not found ` +
				`\(gRPC code 5\); check the mesh, scope or network name`},
	}},
	{"listeners", healthyVM, []injection{
		{row: 11, id: symptom.AccessLogUnwritable, how: "an access log in /root", inject: accessLogElsewhere,
			says: `^Envoy rejected listener bad: it cannot write the access log /root/access\.log ` +
				`\(Permission denied\).*; make /root/access\.log writable by`},
		{row: 10, id: symptom.ListenerRejected, how: "a listener that fails validation, with a secret",
			inject: listenerQuoted, check: keepsSecret,
			says: `^Envoy rejected listener quoted: Proto constraint validation failed ` +
				`\(HttpConnectionManager\.RouteConfig\.VirtualHosts\[0\]\.Routes\[0\]\.RequestHeadersToAdd\[0\]` +
				`\.AppendAction: value must be one of the defined enum values\); services new in it are not ` +
				`intercepted; correct the configuration at the control plane`},
		{row: 22, id: symptom.ServerFirst, how: "a service on port 3306 with an HTTP chain",
			inject: sends(func(c *controlplane.Config) {
				c.Services = append(c.Services, controlplane.Service{Name: "mysql", HTTP: true, Port: 3306,
					Prefixes: controlplane.VIPs("10.30.0.1"), Endpoints: endpoints()})
			}), told: inStatus, disturbs: true,
			says: `^Port 3306 usually speaks a protocol in which the server talks first.*` +
				`; set exclude-outbound-port-ranges=3306`},
		{row: 19, id: symptom.ServingPortNoChain, how: "no inbound listener",
			inject: sends(func(c *controlplane.Config) { c.Inbound = nil }), disturbs: true,
			says: `^Envoy has no inbound listener for port 8081 yet; its traffic goes to the application ` +
				`directly; check that the control plane knows`},
		{row: 0, id: symptom.EntryRefused, how: "a service on the metadata server's address",
			inject: sends(func(c *controlplane.Config) {
				c.Services = append(c.Services, controlplane.Service{Name: "metadata", Port: 80,
					Prefixes: controlplane.VIPs("169.254.169.254"), Endpoints: endpoints()})
			}),
			late: 90 * time.Second, // the last of five on this VM: the budget is spent
			says: `^Listener TRAFFICDIRECTOR_INTERCEPTION_LISTENER asks for .*, which is never intercepted`},
	}},
	{"control plane away", vmWithoutRuntime, []injection{
		{row: 4, id: symptom.ControlPlaneConnect, how: "the control plane's port refuses",
			inject: goesAway,
			says: `^Cannot reach the Traffic Director API server: connect .*connection refused` +
				`; a firewall may block TCP 443`},
		{row: 4, id: symptom.ControlPlaneConnect, how: "the same, and Envoy restarted",
			inject: awayAtStart, disturbs: true, beside: []symptom.ID{symptom.EnvoyNotConfigured},
			check: explains(symptom.EnvoyNotConfigured, symptom.ControlPlaneConnect),
			says: `^Cannot reach the Traffic Director API server: connect .*connection refused` +
				`; a firewall may block TCP 443`},
	}},
	{"control plane blocked", vmWithoutRuntime, []injection{
		{row: 4, id: symptom.ControlPlaneConnect, how: "a firewall drops TCP 443", inject: blocked,
			says: `^Cannot reach the Traffic Director API server: connect .*i/o timeout` +
				`; a firewall may block TCP 443`},
	}},
	{"control plane silent", vmWithoutRuntime, []injection{
		{row: 2, id: symptom.EnvoyNotConfigured, how: "Envoy restarted, its stream is open and silent",
			inject: silentAtStart, disturbs: true,
			says: `^Envoy has not received its configuration \(state \w+\); the rules stay as they are`},
	}},
	{"resolver", vmByName, []injection{
		{row: 3, id: symptom.ControlPlaneLookUp, how: "the resolver knows no such name, Envoy restarted",
			inject: nameGone, disturbs: true, beside: []symptom.ID{symptom.EnvoyNotConfigured},
			says: `^Cannot reach the Traffic Director API server: look up trafficdirector\.googleapis\.com: ` +
				`.*; check the VM's resolver`},
	}},
	{"admin", vmBehindFake, []injection{
		{row: 25, id: symptom.EnvoyTooOld, how: "an Envoy 1.8.0", inject: versionIs("1.8.0"),
			says: `^Envoy 1\.8\.0 is too old: 1\.9\.1 is the minimum; install Envoy 1\.24\.9 or newer`},
		{row: 25, id: symptom.EnvoyTooOld, how: "an Envoy 1.20.0", inject: versionIs("1.20.0"),
			told: inStatus, says: `^Envoy 1\.20\.0 is old; install Envoy 1\.24\.9 or newer`},
	}},
	{"rules", healthyVM, []injection{
		{row: 17, id: symptom.RuleRefused, how: "a rule in table nat that iptables cannot read",
			inject: incompatible, disturbs: true, // iptables-save cannot read it either
			check: func(t *testing.T, p *patient) { through(t, p.Mesh, web4) },
			says: "^The IPv4 rules could not be applied: .*table nat is incompatible.*" +
				"; a program made this table in a form iptables cannot read: `nft list table ip nat` shows it"},
		{row: 34, id: symptom.OtherChain, how: "a nat chain of nft's with priority -110", inject: otherChain,
			told: inStatus,
			says: `^Another nat chain may come before ours: nft inet other output hook output priority -110` +
				`; check with .nft list ruleset.`},
		{row: 13, id: symptom.DriftRepaired, how: "iptables -D of a service's rule, again and again",
			inject: drifting, passes: true, disturbs: true, check: counts(`drift_repaired_total{kind="rule removed"}`),
			says: `^IPv4 rules were changed by iptables \(pid \d+\): rule removed \(SERVICE_PROXY_SERVICE_CIDRS: ` +
				`.*10\.10\.0\.1/32.*\); repaired`},
	}},
	{"fight", healthyVM, []injection{
		{row: 18, id: symptom.Fight, how: "iptables -I of an ACCEPT before our jump, again and again",
			inject: shadowing, disturbs: true, beside: []symptom.ID{symptom.Shadowed,
				symptom.DriftRepaired},
			check: tells(symptom.Shadowed, `^Our jump in OUTPUT is never reached for some traffic: `+
				`-p tcp -j ACCEPT stands before it \(IPv4\); take that rule out`),
			// Either may be the newest that came.
			says: `^(The IPv4 interception rules are undone again and again by iptables \(pid \d+\) ` +
				`\(\d+ times\); stop that program|Our jump in OUTPUT is never reached for some traffic: )`},
	}},
	{"lock", vmWithLock, []injection{
		{row: 17, id: symptom.RuleRefused, how: "another holds the xtables lock", inject: lockHeld,
			disturbs: true,
			says: `^The IPv4 rules could not be applied: .*another program holds the iptables lock: ` +
				`.*; it is tried again; .lsof /run/xtables\.lock. names the program`},
	}},
	{"users", healthyVM, []injection{
		{row: 15, id: symptom.ProxyUser, how: "--proxy-user names nobody", inject: nobodyIsProxy,
			says: `^No rules without the proxy's user, or its own traffic would loop: .*nobody-at-all.*` +
				`; create the user Envoy runs as, or name it with --proxy-user`, disturbs: true},
		{row: 16, id: symptom.FamilyUnusable, how: "no ip6tables", inject: noIP6Tables,
			says:     `^IPv6 interception is off: .*; IPv4 goes on; install the package that has ip6tables`,
			disturbs: true},
	}},
	{"metadata", healthyVM, []injection{
		{row: 26, id: symptom.AttributeBad, how: "the attribute has a string for a port",
			inject: attributeIs(`{"api-version":"0.2","service":{"serving-ports":["eighty"]}}`),
			says: `^The gce-service-proxy attribute cannot be used: .*key service\.serving-ports\[0\]: ` +
				`want a whole number, have a string; correct it; until then the last good one stays in force`},
		{row: 0, id: symptom.MetadataServer, how: "the metadata server answers 503", inject: metadataSick,
			says: `^The metadata server gives no usable answer about the attribute: .*status 503 ` +
				`Service Unavailable; it is asked again`},
		{row: 0, id: symptom.AttributeAdvice, how: "the attribute intercepts port 22",
			inject: attributeIs(`{"api-version":"0.2","proxy-spec":{"network":""},"service":{"serving-ports":[8081,22]}}`),
			// Others come with it, and the newest is told.
			told: inStatus, beside: []symptom.ID{symptom.ServingPortNoChain, symptom.ApplicationSilent},
			says: `^The gce-service-proxy attribute: service\.serving-ports: 22 sends SSH through Envoy`},
	}},
	{"channels", healthyVM, []injection{
		{row: 27, id: symptom.GuestAttributesOff, how: "guest attributes are disabled",
			inject: guestAttributesOff, told: serialLog,
			says: `Guest attributes are disabled: nobody outside can read this agent's status; set the ` +
				`metadata enable-guest-attributes=TRUE on the VM`},
		{row: 0, id: symptom.ListenAddress, how: "another program has :15020", inject: addressTaken,
			told: inStatus,
			says: `^/healthz and /metrics are not served: listen on :15020: address already in use by uid 0;` +
				`.*; stop the program that holds it or set --listen`},
	}},
	{"DNS", vmWithDNS, []injection{
		{row: 42, id: symptom.ResolverLoop, how: "a resolver of uid 4712 that is not let out",
			inject: resolverAppears,
			says: `^Questions of the resolver on 127\.0\.0\.1:53 of uid 4712 go to Envoy's DNS listener, too ` +
				`\(intercept-dns\).*; if so, name 4712 in --resolver-users, together`},
	}},
	{"ports closed", vmBehindFake, []injection{
		{row: 0, id: symptom.InterceptionNotReady, how: "POST /drain_listeners", inject: drained,
			disturbs: true,
			says: `^Envoy's outbound interception port 15001 does not accept IPv[46] connections .*` +
				`; see /\S+/envoy\.err\.log for a bind error`},
		{row: 0, id: symptom.AdminUnreadable, how: "the admin interface answers 500", inject: adminSick,
			says: `^Envoy's admin interface on 127\.0\.0\.1:15100 gives no usable answer: .*status 500` +
				`.*; the rules stay as they are`},
	}},
	{"firewall", healthyVM, []injection{
		{row: 20, id: symptom.InputDropped, how: "iptables -A INPUT -p tcp --dport 15006 -j DROP",
			inject: firewall("-A INPUT -p tcp --dport 15006 -j DROP"),
			says: `^IPv4 traffic to serving port 8081 is dropped by the rule -A INPUT -p tcp -m tcp ` +
				`--dport 15006 -j DROP of table filter \(it sees Envoy's port 15006\); let TCP 15006 in`},
		{row: 20, id: symptom.InputDropped, how: "iptables -P INPUT DROP",
			inject: firewall("-A INPUT -i lo -j ACCEPT",
				"-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT", "-P INPUT DROP"),
			says: `^IPv4 traffic to serving port 8081 is dropped by the policy -P INPUT DROP of table filter` +
				`.*; let TCP 15006 in before that policy`},
		{row: 21, id: symptom.ApplicationSilent, how: "the application stops", inject: applicationStops,
			says: `^The application is not listening on 8081, a serving port: nothing listens there behind ` +
				`Envoy; start it, or take the port out of serving-ports`},
	}},
	{"endpoints", healthyVM, []injection{
		{row: 31, id: symptom.EndpointsUnhealthy, how: "one of four endpoints is unhealthy",
			inject: unhealthy(1), told: inStatus,
			says: `^Some endpoints are unhealthy in cluster cluster-db \(3 of 4 healthy\): traffic may leave ` +
				`its zone or be spread badly; look at the endpoints' health checks`},
		{row: 24, id: symptom.EndpointsPanic, how: "three of four endpoints are unhealthy",
			inject: unhealthy(3),
			check:  func(t *testing.T, p *patient) { through(t, p.Mesh, db4) },
			says: `^Too few endpoints are healthy in cluster cluster-db \(1 of 4 healthy\): Envoy ignores ` +
				`health there and sends to all of them \(panic\); look at the endpoints' health checks`},
	}},
	{"identity", healthyVM, []injection{
		{row: 29, id: symptom.EnvoyIdentity, how: "node.id has another network and project",
			inject: anotherNode, disturbs: true,
			says: `^Envoy presents itself to the control plane with network "other", where this VM's is ` +
				`"default", and project "999", where this VM's is "123456789012" \(node .*\); .*correct node\.id`},
	}},
	{"clock", healthyVM, []injection{
		{row: 30, id: symptom.ClockWrong, how: "the metadata server's Date is ten minutes behind",
			inject: clockAhead,
			says:   `^The clock of this VM is 10m\d*s ahead of the metadata server's: .*; have it set by NTP`},
	}},
	{"another Envoy", vmWithState, []injection{
		{row: 37, id: symptom.EnvoyNotOurs, how: "bootstrap has configured another control plane and node",
			inject: configuredOtherwise, disturbs: true,
			says: `^The Envoy that runs is not the one that was configured: its control plane is ` +
				`10\.131\.0\.1:443, and trafficdirector\.googleapis\.com:443 was configured; its node is .*` +
				`; stop the other Envoy`},
	}},
	{"another user", healthyVM, []injection{
		{row: 15, id: symptom.EnvoyOtherUser, how: "Envoy runs as uid 21338", inject: envoyOfAnother,
			disturbs: true, beside: []symptom.ID{symptom.ForeignOwner, symptom.InterceptionNotReady},
			says: `^What answers as Envoy runs as uid 21338, and the rules let out 21337 \(uid 21337\): its ` +
				`own traffic would come back to it, so interception is off; look who that is; run Envoy as ` +
				`21337, or, only if 21338 is meant to run it, set --proxy-user=21338`},
	}},
	{"connections", healthyVM, []injection{
		{row: 33, id: symptom.OldConnections, how: "a connection, and then the agent's first rules",
			inject: connectedBefore, told: doctorAlone, disturbs: true,
			says: `^A connection from before the rules, and so past Envoy: \S+ to 10\.10\.0\.2:9000 ` +
				`\(uid 1000\); it ends by itself; restart its program`},
		{row: 35, id: symptom.ConntrackFull, how: "91 % of the conntrack table is filled",
			inject: conntrackFilled,
			says: `^The connection tracking table is nearly full: \d+ of \d+ entries; when it is, new ` +
				`connections fail; raise the sysctl net\.netfilter\.nf_conntrack_max`},
	}},
	{"routes, and a watchdog", healthyVM, []injection{
		{row: 36, id: symptom.NoRoute, how: "no IPv6 default route", inject: noRoute6,
			says: `^There is no IPv6 route to fd10::1, 1 of 1 services' addresses: connect fails before ` +
				`interception \(.*\); give the VM an external or internal IPv6 address`},
		{row: 28, id: symptom.AgentStuck, how: "SIGSTOP of the agent, and what systemd's watchdog does",
			inject: hung, anew: true,
			says: `^An earlier run of the agent hung and was restarted by systemd's watchdog at \S+Z` +
				`; the journal has the stack it hung in`},
	}},
	{"tools", healthyVM, []injection{
		{row: 38, id: symptom.ToolsMissing, how: "no iptables", inject: noIPTables, told: doctorAlone,
			beside: []symptom.ID{symptom.FamilyUnusable}, disturbs: true,
			says: `^There is no iptables on this VM: .*; install the package iptables`},
		{row: 13, id: symptom.RulesDiffer, how: "iptables -D of a service's rule, without the agent",
			inject: differing, told: doctorAlone, disturbs: true,
			says: `^The kernel's rules are not what Envoy needs, and no agent repairs them: .*10\.10\.0\.1/32.*` +
				`; start the agent, which repairs them`},
	}},
	{"the brake", healthyVM, []injection{
		{row: 41, id: symptom.InterceptionOff, how: symptom.InterceptionMetadata + "=off on the instance",
			inject: brakeIs("off"), disturbs: true, check: jumpsOut,
			says: `^Interception is off since \S+Z, as intended: this VM's metadata has ` +
				`service-proxy-agent-interception=off; services are reached past Envoy; to end it: gcloud ` +
				`compute instances remove-metadata \S+ --zone=\S+ --project=\S+ ` +
				`--keys=service-proxy-agent-interception`},
		{row: 41, id: symptom.InterceptionKey, how: symptom.InterceptionMetadata + "=stop on the instance",
			inject: brakeIs("stop"),
			says: `^The brake service-proxy-agent-interception="stop" of this VM's metadata is neither off ` +
				`nor bypass-when-down; write off or bypass-when-down, or take the key away`},
	}},
	{"the brake, and a closed port", healthyVM, []injection{
		{row: 41, id: symptom.InterceptionOff, how: "the same, and POST /drain_listeners",
			inject: brakedAndDrained, disturbs: true,
			check: explains(symptom.InterceptionNotReady, symptom.InterceptionOff),
			says:  `^Interception is off since \S+Z, as intended: this VM's metadata has `},
	}},
	{"Google's agent", vmWithUnits, []injection{
		{row: 39, id: symptom.ClosedAgentHere, how: "a unit file of our name that is not ours",
			inject: closedAgentUnit,
			says: `^Google's own agent is installed on this VM, and does not run: /etc/systemd/system/` +
				`service-proxy-agent\.service; remove it, or have .sudo service-proxy-agent bootstrap --take-over.`},
	}},
	{"a cloned disk", healthyVM, []injection{
		{row: 40, id: symptom.OtherVMsState, how: "what the agent has kept is of another VM",
			inject: cloned, told: inStatus, disturbs: true,
			says: `^State of another VM \(instance 4711\) was found at the start and discarded, since this ` +
				`VM is \d+: .*; nothing to do`},
	}},
	{"questions", healthyVM, []injection{
		{row: 12, how: "explain of an address that is no service's", inject: nothing, told: answers,
			ask: "explain 10.99.0.1:81", code: 1,
			says: `Envoy has not been told of 10\.99\.0\.1:81: none of its listeners has this address.*`},
		{row: 14, how: "intercept-all-outbound, and explain of an address without a chain",
			inject: attributeIs(interception(`"intercept-all-outbound":true`)), told: answers, disturbs: true,
			ask: "explain 198.51.100.7:81",
			says: `Envoy has no configuration for 198\.51\.100\.7:81(?s:.*)` +
				`exclude-outbound-ip-ranges=198\.51\.100\.7`},
	}},
}

// elsewhere are the kinds of finding that are not injected here, and where they are, or why not.
var elsewhere = map[symptom.ID]string{
	symptom.Shadowed:        "with row 18's fight: it is told while repairs are held back",
	symptom.Bootstrap:       "TestEnvoyFailures and TestMachineFailures of test/box: bootstrap needs systemd",
	symptom.CouldNotLook:    "TestForeignStorm: a table that changes all the time",
	symptom.ListenerSkipped: "TestForeignText",
	symptom.LogUnreadable:   "TestFollowLogRefuses of envoyadmin",
	symptom.Starting:        "it stands for the first moments of each start",
}

// otherRows are the rows that are no finding, and why.
var otherRows = map[int]string{
	23: "an order, which wait and service-proxy-ready.target hold: TestFirstBoot of test/box",
}

// admit makes a healthy VM.
func admit(t *testing.T, opts mesh.Options, args ...string) *patient {
	t.Helper()
	if opts.Config.Services == nil {
		opts.Config = services()
	}
	m, err := mesh.New(within(t, 30*time.Second), opts)
	must(t, err)
	return attend(t, &patient{Mesh: m, a: m.NewAgent(args...)})
}

// attend starts the VM's agent. All ends with the test.
func attend(t *testing.T, p *patient) *patient {
	t.Helper()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("agent's log:\n%s", p.a.Log())
		}
		must(t, p.Close())
	})
	must(t, p.a.Start())
	must(t, p.a.WaitReady(within(t, 40*time.Second)))
	return p
}

func healthyVM(t *testing.T) *patient { return admit(t, mesh.Options{}) }

func vmWithoutRuntime(t *testing.T) *patient { return admit(t, mesh.Options{NoRuntime: true}) }

// ends has the control plane end each stream.
func ends(how func(*controlplane.Server)) func(*testing.T, *patient) func() {
	return func(t *testing.T, p *patient) func() {
		how(p.CP)
		return func() { p.speak(t) }
	}
}

func notFound(text string) func(*testing.T, *patient) func() {
	return ends(func(cp *controlplane.Server) { cp.Refuse(codes.NotFound, text) })
}

// roleMissing is over though nothing is new at the control plane, so that Envoy logs nothing.
func roleMissing(t *testing.T, p *patient) func() {
	p.CP.RefusePermission()
	return p.CP.Serve
}

// vmWithoutScope: scopes are what the VM was started with.
func vmWithoutScope(t *testing.T) *patient {
	m, err := mesh.New(within(t, 30*time.Second), mesh.Options{Config: services()})
	must(t, err)
	m.Platform.Update(func(v *platform.VM) {
		v.Scopes = []string{"https://www.googleapis.com/auth/devstorage.read_only"}
	})
	return attend(t, &patient{Mesh: m, a: m.NewAgent()})
}

// sends has the control plane send a changed configuration.
func sends(change func(*controlplane.Config)) func(*testing.T, *patient) func() {
	return func(t *testing.T, p *patient) func() {
		c := p.config()
		change(&c)
		_, err := p.CP.Set(c)
		must(t, err)
		return func() {
			_, err := p.CP.Set(p.config())
			must(t, err)
		}
	}
}

func accessLogElsewhere(t *testing.T, p *patient) func() {
	return sends(func(c *controlplane.Config) {
		c.Listeners = append(c.Listeners,
			controlplane.RefusedListener("bad", 16001, "/root/access.log"))
	})(t, p)
}

// secret is in a message that Envoy quotes whole.
const secret = "s3cr3t"

func listenerQuoted(t *testing.T, p *patient) func() {
	before := len(p.CP.Rejections())
	end := sends(func(c *controlplane.Config) {
		c.Listeners = append(c.Listeners, quotedListener(t, "quoted", 16002, "Bearer "+secret))
	})(t, p)
	must(t, p.CP.WaitRejected(within(t, 10*time.Second), before+1))
	if n := p.CP.Rejections(); !strings.Contains(n[len(n)-1].Details, secret) {
		t.Errorf("Envoy says %q, which holds no header", n[len(n)-1].Details)
	}
	return end
}

// keepsSecret checks that nothing that leaves the VM holds the secret, nor the agent's own log.
func keepsSecret(t *testing.T, p *patient) {
	out, _, _, err := p.a.Run(t.Context(), "status", "-o", "json")
	must(t, err)
	for what, text := range map[string]string{
		"status -o json": out, "agent-last-failure": p.lastFailure(),
		"serial": p.Platform.Serial(), "the agent's log": p.a.Log(),
	} {
		if !strings.Contains(text, "quoted") || strings.Contains(text, secret) {
			t.Errorf("%s holds the secret, or nothing at all:\n%s", what, text)
		}
	}
}

func envoyKilled(t *testing.T, p *patient) func() {
	p.Envoy.Kill()
	return func() { must(t, p.Envoy.Start()) }
}

// portsTaken has a stranger on Envoy's ports, who also lies on the admin interface.
func portsTaken(t *testing.T, p *patient) func() {
	p.Envoy.Kill()
	var taken []net.Listener
	for _, addr := range []string{"127.0.0.1:15000", "127.0.0.1:15001", "[::1]:15001"} {
		ln, err := p.VM.ListenAs(4711, "tcp", addr)
		must(t, err)
		t.Cleanup(func() { ln.Close() })
		taken = append(taken, ln)
	}
	return func() {
		for _, ln := range taken {
			ln.Close()
		}
		must(t, p.Envoy.Start())
	}
}

func goesAway(t *testing.T, p *patient) func() {
	p.CP.GoAway()
	return func() {
		must(t, p.CP.ComeBack())
		p.speak(t)
	}
}

func awayAtStart(t *testing.T, p *patient) func() {
	end := goesAway(t, p)
	must(t, p.Envoy.Restart())
	return end
}

// blocked is a firewall on the way, which says nothing. What is established goes on, as with those
// of Google's networks, so Envoy is restarted.
func blocked(t *testing.T, p *patient) func() {
	rule := []string{"-p", "tcp", "--dport", "443", "-j", "DROP"}
	firewall := func(do string) {
		_, err := p.Service.Run(context.WithoutCancel(t.Context()), "iptables",
			slices.Concat([]string{"-w", do, "INPUT"}, rule)...)
		must(t, err)
	}
	firewall("-A")
	p.CP.GoAway()
	must(t, p.CP.ComeBack())
	return func() {
		firewall("-D")
		p.speak(t)
	}
}

func silentAtStart(t *testing.T, p *patient) func() {
	p.CP.Hang()
	must(t, p.Envoy.Restart())
	return func() { p.speak(t) }
}

// explains checks that one finding is listed under another.
func explains(what, by symptom.ID) func(*testing.T, *patient) {
	return func(t *testing.T, p *patient) {
		_, err := p.a.Wait(within(t, 10*time.Second), string(what)+" explained",
			func(s status.Status) bool {
				return slices.ContainsFunc(s.Findings, func(f symptom.Finding) bool {
					return f.ID == what && f.ExplainedBy == by
				})
			})
		must(t, err)
	}
}

// tells checks the words of another finding.
func tells(id symptom.ID, words string) func(*testing.T, *patient) {
	return func(t *testing.T, p *patient) {
		p.named(t, injection{id: id, told: inStatus, says: words}, "")
	}
}

// counts checks that a metric moved.
func counts(series string) func(*testing.T, *patient) {
	return func(t *testing.T, p *patient) {
		if metric(t, p.a, series) == 0 {
			t.Errorf("%s is 0", series)
		}
	}
}

// controlPlaneName is what vmByName's Envoy looks up.
const controlPlaneName = "trafficdirector.googleapis.com"

// vmByName is a VM whose Envoy and agent look the control plane's name up, as on a real one.
func vmByName(t *testing.T) *patient {
	m, err := mesh.New(within(t, 30*time.Second), mesh.Options{Config: services(), NoEnvoy: true})
	must(t, err)
	p := &patient{Mesh: m}
	resolverOf(t, m, func(q *dnsmessage.Message) {
		asked := q.Questions[0]
		switch {
		case p.unresolved.Load() || asked.Name.String() != controlPlaneName+".":
			q.RCode = dnsmessage.RCodeNameError
		case asked.Type == dnsmessage.TypeA:
			q.Answers = []dnsmessage.Resource{{
				Header: dnsmessage.ResourceHeader{Name: asked.Name, Type: dnsmessage.TypeA,
					Class: dnsmessage.ClassINET, TTL: 1},
				Body: &dnsmessage.AResource{A: lab.ControlPlaneAddr.As4()},
			}}
		}
	})
	m.Envoy, err = m.StartEnvoy(
		lab.EnvoyOptions{ControlPlane: m.CPAddr, LookUp: controlPlaneName})
	must(t, err)
	must(t, m.Envoy.WaitReady(within(t, 20*time.Second)))
	p.a = m.NewAgent()
	return attend(t, p)
}

func nameGone(t *testing.T, p *patient) func() {
	p.unresolved.Store(true)
	must(t, p.Envoy.Restart())
	return func() { p.unresolved.Store(false) }
}

func vmBehindFake(t *testing.T) *patient {
	m, err := mesh.New(within(t, 30*time.Second), mesh.Options{Config: services()})
	must(t, err)
	return attend(t, &patient{Mesh: m, a: m.NewAgent("--envoy-admin", fakeAdmin),
		sick: beforeAdmin(t, m)})
}

var versionInfo = regexp.MustCompile(`/1\.\d+\.\d+/`)

// versionIs has Envoy say another version of itself.
func versionIs(version string) func(*testing.T, *patient) func() {
	return func(t *testing.T, p *patient) func() {
		old := sickness(func(w http.ResponseWriter, _ *http.Request, healthy []byte) {
			w.Write(versionInfo.ReplaceAll(healthy, []byte("/"+version+"/")))
		})
		p.sick.Store(&old)
		return func() { p.sick.Store(nil) }
	}
}

func adminSick(t *testing.T, p *patient) func() {
	no := sickness(func(w http.ResponseWriter, _ *http.Request, _ []byte) {
		http.Error(w, "no", http.StatusInternalServerError)
	})
	p.sick.Store(&no)
	return func() { p.sick.Store(nil) }
}

// incompatible is a rule that only nft can make.
func incompatible(t *testing.T, p *patient) func() {
	out, err := p.VM.Run(t.Context(), "nft", "--echo", "--handle", "add", "rule", "ip", "nat",
		"OUTPUT", "jhash", "ip", "saddr", "mod", "2", "0")
	must(t, err)
	_, handle, ok := strings.Cut(strings.TrimSpace(out), "# handle ")
	if !ok {
		t.Fatalf("nft names no handle: %q", out)
	}
	handle, _, _ = strings.Cut(handle, "\n")
	return func() {
		_, err := p.VM.Run(context.WithoutCancel(t.Context()), "nft", "delete", "rule", "ip", "nat", "OUTPUT", "handle",
			handle)
		must(t, err)
	}
}

// otherChain is there when the agent starts, which looks after 20 s, and then each five minutes.
func otherChain(t *testing.T, p *patient) func() {
	_, err := p.VM.RunInput(t.Context(), `table inet other {
		chain output { type nat hook output priority -110; }
	}`, "nft", "-f", "-")
	must(t, err)
	restarts(t, p, func() {})
	return func() {
		_, err := p.VM.Run(context.WithoutCancel(t.Context()), "nft", "delete", "table",
			"inet", "other")
		must(t, err)
		restarts(t, p, func() {})
	}
}

// again does it every so often, until ended.
func again(t *testing.T, every time.Duration, do func()) (end func()) {
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			do()
			select {
			case <-stop:
				return
			case <-time.After(every):
			}
		}
	}()
	var once atomic.Bool
	end = func() {
		if !once.Swap(true) {
			close(stop)
		}
		<-done
	}
	t.Cleanup(end)
	return end
}

// drifting takes a rule out, seldom enough not to be a fight. (A repair is told until the next
// pass.)
func drifting(t *testing.T, p *patient) func() {
	return again(t, 3*time.Second, func() {
		// It fails while there is nothing to delete.
		_, _ = p.VM.Run(t.Context(), "iptables", "-w", "-t", "nat", "-D",
			"SERVICE_PROXY_SERVICE_CIDRS", "-d", "10.10.0.1/32", "-j", "SERVICE_PROXY_REDIRECT")
	})
}

// shadowing keeps a rule before our jump.
func shadowing(t *testing.T, p *patient) func() {
	accept := func(do ...string) error {
		_, err := p.VM.Run(context.WithoutCancel(t.Context()), "iptables", slices.Concat([]string{"-w", "-t", "nat"}, do,
			[]string{"-p", "tcp", "-j", "ACCEPT"})...)
		return err
	}
	end := again(t, 100*time.Millisecond, func() {
		for accept("-D", "OUTPUT") == nil {
		}
		_ = accept("-I", "OUTPUT", "1") // when the lab ends
	})
	return func() {
		end()
		for accept("-D", "OUTPUT") == nil {
		}
	}
}

// vmWithLock has an xtables lock of its own. (The usual one is the whole machine's, and other labs
// would wait as well.)
func vmWithLock(t *testing.T) *patient {
	m, err := mesh.New(within(t, 30*time.Second),
		mesh.Options{Backend: lab.Legacy, Config: services()})
	must(t, err)
	p := &patient{Mesh: m, a: m.NewAgent()}
	p.a.Under = []string{"env", "XTABLES_LOCKFILE=" + p.lockFile()}
	return attend(t, p)
}

func (p *patient) lockFile() string { return filepath.Join(p.Dir, "xtables.lock") }

// lockHeld holds the lock while a service comes.
func lockHeld(t *testing.T, p *patient) func() {
	lock, err := os.OpenFile(p.lockFile(), os.O_RDWR|os.O_CREATE, 0o600)
	must(t, err)
	t.Cleanup(func() { lock.Close() })
	must(t, unix.Flock(int(lock.Fd()), unix.LOCK_EX))
	p.speak(t)
	return func() { must(t, unix.Flock(int(lock.Fd()), unix.LOCK_UN)) }
}

// restarts has the agent started anew, after a change of how.
func restarts(t *testing.T, p *patient, change func()) {
	_, err := p.a.Stop() // as systemctl restart does
	must(t, err)
	change()
	must(t, p.a.Start())
}

func nobodyIsProxy(t *testing.T, p *patient) func() {
	restarts(t, p, func() { p.a.SetArgs("--proxy-user", "nobody-at-all") })
	return func() { restarts(t, p, func() { p.a.SetArgs() }) }
}

// noIP6Tables has the agent see a machine on which the package lacks ip6tables.
func noIP6Tables(t *testing.T, p *patient) func() {
	restarts(t, p, func() { p.a.Under = lacking("ip6tables*") })
	return func() { restarts(t, p, func() { p.a.Under = nil }) }
}

// lacking starts a program where files of /usr/sbin are not.
func lacking(patterns string) []string { return amid("rm -f " + patterns) }

// amid starts a program where commands of a shell in /usr/sbin have changed what is there, in a
// mount namespace of its own.
func amid(commands string) []string {
	return []string{"unshare", "-m", "sh", "-ec", `
		mount -t tmpfs none /mnt
		mkdir /mnt/upper /mnt/work
		mount -t overlay overlay -o lowerdir=/usr/sbin,upperdir=/mnt/upper,workdir=/mnt/work /usr/sbin
		cd /usr/sbin
		` + commands + `
		cd /
		exec "$@"`, "sh"}
}

func attributeIs(text string) func(*testing.T, *patient) func() {
	return func(t *testing.T, p *patient) func() {
		p.Platform.SetAttribute("gce-service-proxy", text)
		return func() { p.Platform.SetAttribute("gce-service-proxy", mesh.Attribute) }
	}
}

func metadataSick(t *testing.T, p *patient) func() {
	remove := p.Platform.Inject(platform.Fault{Prefix: "/computeMetadata/v1/instance/attributes/",
		Status: http.StatusServiceUnavailable})
	// The question that hangs now is not a new one.
	p.Platform.SetAttribute("gce-service-proxy", mesh.Attribute+" ")
	return remove
}

func guestAttributesOff(t *testing.T, p *patient) func() {
	p.Platform.Update(func(v *platform.VM) { v.GuestAttributesDisabled = true })
	restarts(t, p, func() {}) // which writes at once
	return func() {
		p.Platform.Update(func(v *platform.VM) { v.GuestAttributesDisabled = false })
		restarts(t, p, func() {})
	}
}

func addressTaken(t *testing.T, p *patient) func() {
	p.a.Kill()
	ln, err := p.VM.Listen("tcp", "0.0.0.0:15020")
	must(t, err)
	t.Cleanup(func() { ln.Close() })
	must(t, p.a.Start())
	return func() { ln.Close() }
}

func vmWithDNS(t *testing.T) *patient {
	c := services()
	c.DNS = &controlplane.DNS{Names: map[string][]netip.Addr{"web.test": {fromEnvoy}}}
	return admit(t, mesh.Options{Config: c, Attribute: interception(`"intercept-dns":true`)},
		"--resolver-users", "4711")
}

func resolverAppears(t *testing.T, p *patient) func() {
	conn := listenUDPAs(t, p.Mesh, 4712, "127.0.0.1:53")
	return func() { conn.Close() }
}

// drained has Envoy close its listeners, which it goes on listing.
func drained(t *testing.T, p *patient) func() {
	resp, err := p.VM.HTTP().Post("http://"+lab.AdminAddr.String()+"/drain_listeners", "", nil)
	must(t, err)
	_, err = io.Copy(io.Discard, resp.Body)
	must(t, err)
	resp.Body.Close()
	return func() { must(t, p.Envoy.Restart()) }
}

// stopped is SIGSTOP of a process.
func stopped(t *testing.T, pid int) (end func()) {
	must(t, syscall.Kill(pid, syscall.SIGSTOP))
	end = func() { _ = syscall.Kill(pid, syscall.SIGCONT) } // it may have ended
	t.Cleanup(end)
	return end
}
