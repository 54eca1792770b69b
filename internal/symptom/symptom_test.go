package symptom

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// example is a situation and the finding that must come first.
type example struct {
	when  string
	facts Facts
	want  ID // "": none
}

var now = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

var web1 = VM{Name: "web-1", Zone: "europe-west1-b", Project: "my-project",
	ProjectNumber: "123456789012", Network: "default"}

// live is an Envoy that is well.
func live(change func(*Facts)) Facts {
	f := Facts{ProxyUser: "envoy", ProxyUID: 107, VM: web1, Account: "web@my-project.iam.gserviceaccount.com",
		Scopes: []string{cloudPlatform},
		Envoy: Envoy{Admin: "127.0.0.1:15000", State: "LIVE", Version: envoyadmin.Version{
			Major: 1, Minor: 40}, Configured: true}}
	if change != nil {
		change(&f)
	}
	return f
}

func with(f Facts, change func(*Facts)) Facts {
	change(&f)
	return f
}

// presents is an Envoy on a VM of project 123456789012 and network default that says so of itself.
func presents(project, network string) func(*Facts) {
	return func(f *Facts) {
		f.Node = &Node{ProjectNumber: "123456789012", Network: "default"}
		f.Presented = &Node{ID: "projects/" + project + "/networks/" + network + "/nodes/7f0c",
			ProjectNumber: project, Network: network}
	}
}

// manyClusters are n of five endpoints, of which so many are healthy.
func manyClusters(n, healthy int) (all []Cluster) {
	for i := range n {
		all = append(all, Cluster{ClusterHealth: envoyadmin.ClusterHealth{
			Name: fmt.Sprintf("cluster-%03d", i), Total: 5, Healthy: healthy}})
	}
	return all
}

func family(change func(*Family)) Facts {
	return live(func(f *Facts) {
		f.Families = []Family{{Family: iptables.IPv4}}
		change(&f.Families[0])
	})
}

func stream(code int, message string) Facts {
	return live(func(f *Facts) {
		f.Envoy.State, f.Envoy.Configured = "PRE_INITIALIZING", false
		f.Envoy.Stream = &Stream{Target: "trafficdirector.googleapis.com:443", Code: code,
			Message: message, When: now}
	})
}

var malformed = func() error {
	_, err := attribute.Parse([]byte(`{"api-version":"0.2","service":{"serving-ports":["eighty"]}}`))
	return err
}()

var examples = []example{
	{"all is well", live(nil), ""},
	{"Envoy does not run", live(func(f *Facts) {
		f.Envoy.Err, f.Envoy.Since, f.Envoy.LastError = fmt.Errorf("get: %w", envoyadmin.ErrRefused), now,
			"error initializing configuration"
	}), EnvoyDown},
	{"the admin socket is not shared by its container", live(func(f *Facts) {
		f.Envoy.Admin, f.Envoy.Unit = "unix:///run/envoy/admin.sock", NoUnit
		f.Envoy.Err, f.Envoy.Since = fmt.Errorf("get: %w", envoyadmin.ErrRefused), now
	}), EnvoyDown},
	{"Envoy got no listener and nothing says why", live(func(f *Facts) { f.Envoy.State, f.Envoy.Configured = "PRE_INITIALIZING", false }), EnvoyNotConfigured},
	{"the control plane's name does not resolve", live(func(f *Facts) {
		f.Envoy.Configured, f.Envoy.Stream = false, &Stream{Code: 13}
		f.Envoy.Probe = &envoyadmin.ProbeError{Step: envoyadmin.ErrLookUp,
			Target: "trafficdirector.googleapis.com", Err: errors.New("no such host")}
	}), ControlPlaneLookUp},
	{"port 443 is blocked", live(func(f *Facts) {
		f.Envoy.Configured = false
		f.Envoy.Probe = &envoyadmin.ProbeError{Step: envoyadmin.ErrConnect,
			Target: "trafficdirector.googleapis.com:443", Err: os.ErrDeadlineExceeded}
	}), ControlPlaneConnect},
	{"port 443 refuses", live(func(f *Facts) {
		f.Envoy.Configured = false
		f.Envoy.Probe = &envoyadmin.ProbeError{Step: envoyadmin.ErrConnect,
			Target: "trafficdirector.googleapis.com:443", Err: syscall.ECONNREFUSED}
	}), ControlPlaneConnect},
	{"the stream ends without a reason, our own way works", with(stream(13, ""), func(f *Facts) { f.Envoy.Probed = true }), ControlPlaneConnect},
	{"Envoy has no stream and does not say why, our own way works", live(func(f *Facts) { f.Envoy.Apart, f.Envoy.Probed = true, true }), ControlPlaneConnect},
	{"the API is not enabled", stream(7, "Traffic Director API has not been used in project 123456789012 before or it is disabled. Enable it by visiting …"), APINotEnabled},
	{"the service account lacks the role", stream(7, "Permission denied on resource project 123456789012."), PermissionDenied},
	{"the VM lacks the scope", func() Facts {
		f := stream(7, "Request had insufficient authentication scopes.")
		f.Scopes = []string{"https://www.googleapis.com/auth/devstorage.read_only"}
		return f
	}(), ScopeMissing},
	{"no configuration for the network", stream(5, `Traffic Director configuration was not found for network "default" in project "123456789012".`), ConfigNotFound},
	{"the same under the new name", stream(5, `Cloud Service Mesh configuration was not found for network "default" in project "123456789012".`), ConfigNotFound},
	{"an unknown mesh or scope", stream(5, "Requested entity was not found."), ConfigNotFound},
	{"any other end of the stream", stream(8, "Quota exceeded"), ControlPlaneRefused},
	{"a listener is rejected", live(func(f *Facts) {
		f.Envoy.Rejected = []envoyadmin.Rejected{{Name: "l", Details: "duplicate address 0.0.0.0:15001"}}
	}), ListenerRejected},
	{"its access log cannot be written", live(func(f *Facts) {
		f.Envoy.Rejected = []envoyadmin.Rejected{
			{Name: "l", Details: "unable to open file '/var/log/envoy.log': Permission denied"}}
	}), AccessLogUnwritable},
	{"a rule was removed and put back", family(func(f *Family) {
		f.Drift, f.By = []iptables.Drift{
			{Kind: iptables.JumpRemoved, Chain: "OUTPUT", Rule: "-p tcp -j SERVICE_PROXY_OUTPUT"}}, "iptables (pid 4711)"
	}), DriftRepaired},
	{"the proxy's user does not exist", live(func(f *Facts) { f.UserErr = errors.New(`look up user "envoy": unknown user envoy`) }), ProxyUser},
	{"the kernel has no table nat for IPv6", family(func(f *Family) { f.Family, f.Unusable = iptables.IPv6, iptables.ErrNoTable }), FamilyUnusable},
	{"ip6tables is not installed", family(func(f *Family) {
		f.Family = iptables.IPv6
		f.Unusable = fmt.Errorf("find %q: %w", "ip6tables", iptables.ErrNoIPTables)
	}), FamilyUnusable},
	{"no iptables table nat", family(func(f *Family) { f.Unusable = iptables.ErrNoTable }), FamilyUnusable},
	{"the lock is held", family(func(f *Family) { f.Err = iptables.ErrLocked }), RuleRefused},
	{"the table is incompatible", family(func(f *Family) { f.Err = iptables.ErrIncompatible }), RuleRefused},
	{"a match is missing", family(func(f *Family) {
		f.Left = []iptables.RefusedError{
			{Family: iptables.IPv4, Rule: "-A SERVICE_PROXY_OUTPUT -m comment --comment x -j RETURN", Stderr: "Couldn't load match `comment'"}}
	}), RuleRefused},
	{"the rules cannot be read", family(func(f *Family) { f.Err = iptables.ErrCouldNotLook }), CouldNotLook},
	{"a rule before our jump takes its packets", family(func(f *Family) {
		f.Shadow = []iptables.Drift{{Kind: iptables.Shadowed, Chain: "OUTPUT", Rule: "-p tcp -j ACCEPT"}}
	}), Shadowed},
	{"somebody keeps undoing our rules", family(func(f *Family) { f.Fighting, f.By, f.Undone = true, "firewalld (pid 4711)", 12 }), Fight},
	{"a serving port without an inbound listener", live(func(f *Facts) { f.Uncovered = []uint16{8080} }), ServingPortNoChain},
	{"a server-first protocol behind an inspecting listener", live(func(f *Facts) { f.ServerFirst = []uint16{3306} }), ServerFirst},
	{"Envoy is too old", live(func(f *Facts) { f.Envoy.Version = envoyadmin.Version{Major: 1, Minor: 8} }), EnvoyTooOld},
	{"Envoy is old", live(func(f *Facts) { f.Envoy.Version = envoyadmin.Version{Major: 1, Minor: 20} }), EnvoyTooOld},
	{"bootstrap failed", live(func(f *Facts) {
		f.Bootstrap = "install Envoy: primary-source: download gs://b/envoy.tgz: status 403 Forbidden: grant the " +
			"VM's service account roles/storage.objectViewer on the bucket; mend that source, or give " +
			"primary-source=gs://BUCKET/OBJECT.tgz in --service-proxy, or install Envoy 1.24.9 or later as " +
			"/usr/local/bin/envoy; it is tried again when the attribute changes, and at least every 5 minutes"
	}), Bootstrap},
	{"the attribute is malformed", live(func(f *Facts) { f.Attribute = malformed }), AttributeBad},
	{"the attribute is missing", live(func(f *Facts) {
		f.Attribute = fmt.Errorf("%w; create its template with --service-proxy enabled",
			attribute.ErrMissing)
	}), AttributeBad},
	{"the attribute is malformed, and there was none before", live(func(f *Facts) { f.Attribute, f.NoAttribute = malformed, true }), AttributeBad},
	{"the metadata server is away", live(func(f *Facts) { f.Metadata = errors.New("status 503 Service Unavailable") }), MetadataServer},
	{"the metadata server is away, and there was no attribute before", live(func(f *Facts) { f.Metadata, f.NoAttribute = errors.New("no answer within 10s"), true }), MetadataServer},
	{"guest attributes are disabled", live(func(f *Facts) { f.GuestOff = true }), GuestAttributesOff},
	{"another user on Envoy's port", live(func(f *Facts) {
		f.Ports = []Port{
			{Family: iptables.IPv4, Purpose: "outbound interception", Addr: netip.MustParseAddrPort("127.0.0.1:15001"), Owner: 4711, Listening: true}}
	}), ForeignOwner},
	{"Envoy runs as another user than the rules let out", live(func(f *Facts) {
		f.Ports = []Port{
			{Family: iptables.IPv4, Purpose: "outbound interception", Addr: netip.MustParseAddrPort("0.0.0.0:15001"), OwnerName: "root", Listening: true}}
		f.Processes = []uint32{0}
	}), EnvoyOtherUser},
	{"another Envoy answers than that which bootstrap configured", live(func(f *Facts) {
		f.Configured = &EnvoyConfig{NodeID: "projects/123456789012/networks/default/nodes/7f0c", Targets: []string{"trafficdirector.googleapis.com:443"}, From: "/etc/envoy/envoy.json"}
		f.Running = &EnvoyConfig{NodeID: "sidecar~10.0.0.1~web", Targets: []string{"istiod.istio-system.svc:15012"}, From: "pid 4711"}
	}), EnvoyNotOurs},
	{"a hand-written bootstrap names another network, and nothing comes", with(stream(5, `Traffic Director configuration was not found for network "defualt" in project "123456789012".`), presents("123456789012", "defualt")), EnvoyIdentity},
	{"a hand-written bootstrap names no project, and Envoy is configured", live(presents("", "default")), EnvoyIdentity},
	{"the clock is seven minutes ahead, and the control plane's certificate is not believed", live(func(f *Facts) {
		f.Clock = 7 * time.Minute
		f.Envoy.Probe = &envoyadmin.ProbeError{Step: envoyadmin.ErrTLS, Target: "trafficdirector.googleapis.com", Err: errors.New("certificate has expired or is not yet valid")}
	}), ClockWrong},
	{"the clock is 40 seconds behind", live(func(f *Facts) { f.Clock = -40 * time.Second }), ClockWrong},
	{"most endpoints of a cluster are unhealthy", live(func(f *Facts) {
		f.Clusters = []Cluster{{ClusterHealth: envoyadmin.ClusterHealth{Name: "web", Total: 5, Healthy: 1}, Panic: true}}
	}), EndpointsPanic},
	{"so are those of many", live(func(f *Facts) { f.Clusters = manyClusters(40, 1) }), EndpointsPanic},
	{"an endpoint of a cluster is unhealthy", live(func(f *Facts) {
		f.Clusters = []Cluster{
			{ClusterHealth: envoyadmin.ClusterHealth{Name: "web", Total: 5, Healthy: 4}}}
	}), EndpointsUnhealthy},
	{"a firewall rule of the VM drops a serving port", live(func(f *Facts) {
		f.Dropped = []Dropped{{Family: iptables.IPv4, Port: 8080, At: 15006, Chain: "INPUT", Rule: "-p tcp -m tcp --dport 15006 -j DROP"}}
	}), InputDropped},
	{"the policy does, and nothing accepts before it", live(func(f *Facts) {
		f.Dropped = []Dropped{{Family: iptables.IPv6, Port: 8080, At: 8080, Chain: "INPUT"}}
	}), InputDropped},
	{"the application does not listen", live(func(f *Facts) { f.Silent = []uint16{8080} }), ApplicationSilent},
	{"the VM has no IPv6 route", live(func(f *Facts) {
		f.NoRoute = []Unrouted{{Family: iptables.IPv6, Addrs: []netip.Addr{netip.MustParseAddr("fd10::1")}, Count: 1, Of: 12, Err: "network is unreachable"}}
	}), NoRoute},
	{"the connection tracking table is nearly full", live(func(f *Facts) { f.Conntrack = Conntrack{Count: 60000, Max: 65536} }), ConntrackFull},
	{"it is full", live(func(f *Facts) { f.Conntrack = Conntrack{Count: 65536, Max: 65536, Dropped: 12} }), ConntrackFull},
	{"connections from before the rules", live(func(f *Facts) {
		f.Old = []OldConnection{{From: netip.MustParseAddrPort("10.128.0.5:41000"), To: netip.MustParseAddrPort("10.0.0.1:80"), UID: 1000}}
	}), OldConnections},
	{"rules are missing and no agent runs", live(func(f *Facts) {
		f.Differ = []iptables.Drift{{Kind: iptables.JumpRemoved, Chain: "OUTPUT", Rule: "-p tcp -j SERVICE_PROXY_OUTPUT"}, {Kind: iptables.ChainFlushed, Chain: "SERVICE_PROXY_OUTPUT"}}
	}), RulesDiffer},
	{"the loop has ended no pass for minutes", live(func(f *Facts) { f.Agent = Agent{Heartbeat: now, Now: now.Add(6 * time.Minute)} }), AgentStuck},
	{"systemd's watchdog ended an earlier run", live(func(f *Facts) { f.Agent.Killed = now }), AgentStuck},
	{"there is no iptables", live(func(f *Facts) {
		f.NoTools = errors.New(`exec: "iptables-save": executable file not found in $PATH`)
	}), ToolsMissing},
	{"a resolver of the VM whose user is not exempt from intercept-dns", live(func(f *Facts) {
		f.Resolvers = []Port{
			{Addr: netip.MustParseAddrPort("127.0.0.1:53"), Owner: 110, OwnerName: "bind", Listening: true},
			{Addr: netip.MustParseAddrPort("127.0.0.53:53"), Owner: 101, OwnerName: "systemd-resolve", Listening: true},
		}
		f.ResolverUIDs = []uint32{101}
	}), ResolverLoop},
	{"Envoy's port is closed", live(func(f *Facts) {
		f.Ports = []Port{
			{Family: iptables.IPv4, Purpose: "outbound interception", Addr: netip.MustParseAddrPort("127.0.0.1:15001")}}
	}), InterceptionNotReady},
	{"Envoy's container has a network of its own", live(func(f *Facts) {
		f.Envoy.Admin = "unix:///run/envoy/admin.sock"
		f.Ports = []Port{{Family: iptables.IPv4, Purpose: "outbound interception",
			Addr: netip.MustParseAddrPort("127.0.0.1:15001")}}
	}), InterceptionNotReady},
	{"the agent's user may not connect to the admin socket", live(func(f *Facts) {
		f.Envoy.Admin = "unix:///run/envoy/admin.sock"
		f.Envoy.Err = fmt.Errorf("get \"/ready\": %w: connect: %w", envoyadmin.ErrConnection, fs.ErrPermission)
	}), AdminUnreadable},
	{"the admin interface answers garbage", live(func(f *Facts) { f.Envoy.Err = envoyadmin.ErrNotJSON }), AdminUnreadable},
	{"the admin interface does not answer", live(func(f *Facts) { f.Envoy.Err = fmt.Errorf("get \"/ready\": %w", envoyadmin.ErrTimeout) }), AdminUnreadable},
	{"its answer is too large", live(func(f *Facts) { f.Envoy.Err = fmt.Errorf("get \"/config_dump\": %w", envoyadmin.ErrTooLarge) }), AdminUnreadable},
	{"the admin interface forbids a path", live(func(f *Facts) { f.Envoy.Err = envoyadmin.ErrForbiddenPath }), AdminUnreadable},
	{"another nat chain at our hook", live(func(f *Facts) {
		f.Others = []iptables.OtherChain{
			{Backend: "nft", Family: "inet", Table: "other", Chain: "output", Hook: iptables.Output, Priority: -110}}
	}), OtherChain},
	{"a listener asks for what is never intercepted", live(func(f *Facts) {
		f.Refused = []Refusal{
			{Listener: "l", Entry: "169.254.169.254/32", Reason: "it is link-local, where the metadata server is"}}
	}), EntryRefused},
	{"a listener of a shape that is not intercepted", live(func(f *Facts) {
		f.Envoy.Skipped = []envoyadmin.Skipped{{Listener: "l", Reason: "its address is a pipe"}}
	}), ListenerSkipped},
	{"Envoy runs, and its log is not there", live(func(f *Facts) {
		f.Envoy.LogErr = "open /var/log/envoy/envoy.err.log: no such file or directory"
	}), LogUnreadable},
	{"Envoy's log cannot be read", live(func(f *Facts) { f.Envoy.LogErr = "open /var/log/envoy/envoy.err.log: permission denied" }), LogUnreadable},
	{"the attribute asks for something that is advised against", live(func(f *Facts) {
		f.Advice = []string{
			"service.serving-ports: 22 sends SSH through Envoy; a broken mesh then locks you out"}
	}), AttributeAdvice},
	{"Google's own agent runs", live(func(f *Facts) {
		f.ClosedAgent = &ClosedAgent{Unit: "/etc/systemd/system/service-proxy-agent.service, active", Starts: true,
			Binary: "/usr/local/bin/google-service-proxy-agent", Process: "4711 /usr/local/bin/google-service-proxy-agent",
			Writes: "agent-heartbeat is of another's"}
	}), ClosedAgentHere},
	{"its unit starts it at the next boot", live(func(f *Facts) {
		f.ClosedAgent = &ClosedAgent{Unit: "/etc/systemd/system/service-proxy-agent.service, enabled", Starts: true}
	}), ClosedAgentHere},
	{"its files lie there, and nothing starts it", live(func(f *Facts) {
		f.ClosedAgent = &ClosedAgent{Unit: "/etc/systemd/system/service-proxy-agent.service, disabled"}
	}), ClosedAgentHere},
	{"the VM's disk was made from another VM's", live(func(f *Facts) {
		f.Discarded = &Discarded{Instance: "4711", This: "4712", What: []string{"the attribute that was kept", "the last failures", "the history", "whether the brake was on"}, At: now}
	}), OtherVMsState},
	{"the instance's metadata turns interception off", live(func(f *Facts) {
		f.Brake = Brake{Off: true, Since: now, By: ByInstance}
	}), InterceptionOff},
	{"the project's metadata turns interception off", live(func(f *Facts) {
		f.Brake = Brake{Off: true, Since: now, By: ByProject}
	}), InterceptionOff},
	{"the instance's key has another value", live(func(f *Facts) {
		f.Brake = Brake{Bad: "stop", BadBy: ByInstance}
	}), InterceptionKey},
	{"the project's key has another value", live(func(f *Facts) {
		f.Brake = Brake{Bad: "aus", BadBy: ByProject}
	}), InterceptionKey},
	{":15020 is taken", live(func(f *Facts) { f.ListenErr = errors.New("listen tcp :15020: address already in use") }), ListenAddress},
	{"the web config file of --metrics-listen is wrong", live(func(f *Facts) {
		f.MetricsErr = errors.New(`web config file "/etc/service-proxy-agent/web-config.yml": line 3: unknown key "keyfile" in tls_server_config`)
	}), ListenAddress},
}

// TestExamples: each situation gives its finding, in one line with a next step.
func TestExamples(t *testing.T) {
	for _, e := range examples {
		findings := Check(e.facts)
		for _, found := range findings {
			isKind(t, found)
		}
		if e.want == "" {
			if len(findings) > 0 {
				t.Errorf("%s: %+v", e.when, findings)
			}
			continue
		}
		if len(findings) == 0 || findings[0].ID != e.want {
			t.Errorf("%s: %+v, want %s first", e.when, findings, e.want)
			continue
		}
		f := findings[0]
		if strings.ContainsFunc(f.Text(), unicode.IsControl) || len(f.Text()) > 900 || f.Cause == "" {
			t.Errorf("%s: %q is no line for a guest attribute", e.when, f.Text())
		}
		if f.Next == "" && f.ID != Bootstrap && f.ID != ListenerSkipped {
			t.Errorf("%s: %q has no next step", e.when, f.Cause)
		}
	}
}

// TestEveryID: each ID has an example, and so its words in docs/symptoms.md; but Starting,
// which Check does not find.
func TestEveryID(t *testing.T) {
	source, err := os.ReadFile("symptom.go")
	if err != nil {
		t.Fatal(err)
	}
	ids := regexp.MustCompile(`\sID = "([^"]+)"`).FindAllSubmatch(source, -1)
	if len(ids) < 30 {
		t.Errorf("%d IDs found in symptom.go", len(ids))
	}
	for _, m := range ids {
		id := ID(m[1])
		if id != Starting && !slices.ContainsFunc(examples, func(e example) bool {
			return e.want == id
		}) {
			t.Errorf("%s has no example", id)
		}
	}
}

// TestExplained: what follows from another finding is listed under it and comes after it.
func TestExplained(t *testing.T) {
	findings := Check(stream(7, "Permission denied"))
	var ids []string
	for _, f := range findings {
		ids = append(ids, string(f.ID)+"<"+string(f.ExplainedBy))
	}
	want := []string{"permission-denied<", "envoy-not-configured<permission-denied"}
	if !reflect.DeepEqual(ids, want) {
		t.Errorf("got %v, want %v", ids, want)
	}
	down := live(func(f *Facts) {
		f.Envoy.Err = envoyadmin.ErrRefused
		f.Ports = []Port{
			{Family: iptables.IPv4, Purpose: "outbound interception", Addr: netip.MustParseAddrPort("127.0.0.1:15001")}}
	})
	if got := Check(down); len(got) != 2 || got[0].ID != EnvoyDown || got[1].ExplainedBy != EnvoyDown {
		t.Errorf("Envoy down: %+v", got)
	}
	down.Envoy.Unit, down.Ports[0].Listening, down.Ports[0].Owner = "active, running", true, down.ProxyUID
	if got := Check(down); len(got) != 1 || got[0].ID != AdminUnreadable ||
		!strings.Contains(got[0].Cause, "Envoy serves") {
		t.Errorf("Envoy without its admin interface: %+v", got)
	}
	down.Envoy.Handover = true
	if got := Check(down); len(got) != 0 {
		t.Errorf("while the next Envoy starts: %+v", got)
	}
	starts := live(func(f *Facts) {
		f.Envoy.State, f.Envoy.Configured, f.Envoy.Handover = "PRE_INITIALIZING", false, true
	})
	if got := Check(starts); len(got) != 0 {
		t.Errorf("while the next Envoy initializes: %+v", got)
	}
}

// TestResolverLoop: a resolver is named once, unless the rules let its questions out or it is
// Envoy. Who made a socket as root and asks as another user cannot be told, so root counts only
// where nobody is let out.
func TestResolverLoop(t *testing.T) {
	at := func(addr string, uid uint32) Port {
		return Port{Addr: netip.MustParseAddrPort(addr), Owner: uid, Listening: true}
	}
	for _, tt := range []struct {
		name   string
		have   []Port
		exempt []uint32
		want   []string
	}{
		{"nobody", nil, []uint32{101}, nil},
		{"let out", []Port{at("127.0.0.53:53", 101)}, []uint32{100, 101}, nil},
		{"Envoy", []Port{at("0.0.0.0:53", 107)}, nil, nil},
		{"two sockets of one, and another", []Port{at("127.0.0.1:53", 110), at("[::1]:53", 110), at("127.0.0.2:53", 111)}, []uint32{101}, []string{"110", "111"}},
		{"made by root", []Port{at("127.0.0.1:53", 0)}, []uint32{101}, nil},
		{"made by root, nobody let out", []Port{at("127.0.0.1:53", 0)}, nil, []string{"0"}},
	} {
		var have []string
		for _, f := range Check(live(func(f *Facts) {
			f.Resolvers, f.ResolverUIDs = tt.have, tt.exempt
		})) {
			if f.ID != ResolverLoop || !strings.Contains(f.Next, "--resolver-users") {
				t.Errorf("%s: %+v", tt.name, f)
			}
			have = append(have, f.Key)
		}
		if !slices.Equal(have, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, have, tt.want)
		}
	}
}

// TestOrder: the same facts give the same findings in the same order.
func TestOrder(t *testing.T) {
	all := live(func(f *Facts) {
		for _, e := range examples {
			f.Families = append(f.Families, e.facts.Families...)
			f.Envoy.Rejected = append(f.Envoy.Rejected, e.facts.Envoy.Rejected...)
			f.Uncovered = append(f.Uncovered, e.facts.Uncovered...)
		}
		f.GuestOff = true
	})
	first := Check(all)
	for range 20 {
		if !reflect.DeepEqual(first, Check(all)) {
			t.Fatal("the order changes")
		}
	}
	for i := 1; i < len(first); i++ {
		if first[i].Severity > first[i-1].Severity {
			t.Errorf("%v after %v", first[i], first[i-1])
		}
	}
}

// TestManyAlike: of what a control plane sends any number of, some are told, and how many more.
func TestManyAlike(t *testing.T) {
	const n = 100_000
	for _, c := range []struct {
		id   ID
		make func(*Facts)
		says string
	}{
		{EntryRefused, func(f *Facts) {
			for i := range n {
				f.Refused = append(f.Refused, Refusal{"l", strconv.Itoa(i), "it is loopback"})
			}
		}, "Listeners ask for 99968 more entries that are never intercepted"},
		{ListenerSkipped, func(f *Facts) {
			for i := range n {
				f.Envoy.Skipped = append(f.Envoy.Skipped,
					envoyadmin.Skipped{Listener: strconv.Itoa(i), Reason: "its address is a pipe"})
			}
		}, "99968 more listeners are not intercepted"},
		{ListenerRejected, func(f *Facts) {
			for i := range n {
				f.Envoy.Rejected = append(f.Envoy.Rejected,
					envoyadmin.Rejected{Name: strconv.Itoa(i), Details: "no"})
			}
		}, "Envoy rejected 99968 more listeners"},
	} {
		var found []Finding
		for _, f := range Check(live(c.make)) {
			if f.ID == c.id {
				found = append(found, f)
			}
		}
		if len(found) != 33 || found[32].Cause != c.says || found[32].Key != "more" {
			t.Errorf("%s: %d findings, the last %+v", c.id, len(found), found[len(found)-1])
		}
	}
}
