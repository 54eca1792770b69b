package symptom

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write docs/symptoms.md")

const document = "../../docs/symptoms.md"

// byHand parts what is made of the program's words from what follows: what only a scrape shows is
// no finding, so its sections are written in the document itself.
const byHand = "\n<!-- What follows is written by hand. -->\n"

// sections are where somebody looks who is woken up. Each kind is in one of them.
var sections = []struct {
	title, intro string
	ids          []ID
}{
	{"Envoy", "While Envoy does not accept, what is redirected to it fails. With\n" +
		"`--when-envoy-down=bypass` it goes out as it is.",
		[]ID{EnvoyDown, EnvoyNotConfigured, AdminUnreadable, InterceptionNotReady, ForeignOwner,
			EnvoyOtherUser, EnvoyNotOurs, EnvoyTooOld, LogUnreadable}},
	{"The control plane", "Connections go on as they are. What changes does not arrive, and an " +
		"Envoy that starts now gets\nnothing. All but the last two are told as `Cannot reach the " +
		"Traffic Director API server: …`, also where\nthe control plane is called Cloud Service Mesh: " +
		"the words behind the colon tell them apart.",
		[]ID{ControlPlaneLookUp, ControlPlaneConnect, APINotEnabled, PermissionDenied, ScopeMissing,
			ConfigNotFound, ControlPlaneRefused, EnvoyIdentity, ClockWrong}},
	{"Listeners", "What the control plane sent, and Envoy or the agent does not take. It is mended\n" +
		"there, for all VMs at once.",
		[]ID{ListenerRejected, AccessLogUnwritable, ServingPortNoChain, ServerFirst, EntryRefused,
			ListenerSkipped}},
	{"Services and clients", "What stands in their way on this VM or behind it. The rules are as they " +
		"should be.",
		[]ID{EndpointsPanic, EndpointsUnhealthy, InputDropped, ApplicationSilent, NoRoute, ConntrackFull,
			OldConnections}},
	{"The rules on this VM", "What the kernel has is not, or not for long, what it should have.",
		[]ID{ToolsMissing, ProxyUser, FamilyUnusable, RuleRefused, RulesDiffer, CouldNotLook, Shadowed,
			Fight, DriftRepaired, OtherChain, ResolverLoop}},
	{"Installation and settings", "",
		[]ID{Bootstrap, AttributeBad, AttributeAdvice, MetadataServer, InterceptionOff, InterceptionKey,
			ClosedAgentHere, OtherVMsState}},
	{"The agent itself", "Interception goes on.",
		[]ID{AgentStuck, GuestAttributesOff, ListenAddress, Starting}},
}

// alsoTold are the words under which others tell what a kind finds, and users search for it:
// Envoy's log, the kernel, iptables, curl, and the guides for Traffic Director. … stands for
// anything.
var alsoTold = map[ID][]string{
	EnvoyDown:          {"Failed to connect to … port …: Connection refused"},
	EnvoyNotConfigured: {"PRE_INITIALIZING", "The Envoy proxies don't receive configuration"},
	ControlPlaneLookUp: {"StreamAggregatedResources gRPC config stream closed: 13,",
		"DNS resolution failed"},
	ControlPlaneConnect: {"The Envoy proxies don't connect", "Unable to establish new stream",
		"StreamAggregatedResources gRPC config stream closed: 14, upstream connect error or " +
			"disconnect/reset before headers"},
	APINotEnabled: {"gRPC config stream closed: 7, Traffic Director API has not been used in " +
		"project … before or it is disabled."},
	PermissionDenied: {"gRPC config stream closed: 7, Permission denied on resource project …",
		"PERMISSION_DENIED"},
	ScopeMissing: {"gRPC config stream closed: 7, Request had insufficient authentication " +
		"scopes."},
	ConfigNotFound: {
		`gRPC config stream closed: 5, Traffic Director configuration was not found for network "…" in ` +
			`project "…".`,
		`gRPC config stream closed: 5, Cloud Service Mesh configuration was not found for network ` +
			`"…" in project "…".`,
		"gRPC config stream closed: 5, Requested entity was not found.", "NOT_FOUND"},
	ControlPlaneRefused: {"gRPC config stream closed: 8, …", "RESOURCE_EXHAUSTED"},
	ClockWrong:          {"certificate has expired or is not yet valid", "CERTIFICATE_VERIFY_FAILED"},
	ListenerRejected: {
		"gRPC config for type.googleapis.com/envoy.config.listener.v3.Listener rejected: Error " +
			"adding/updating listener(s) …",
		"gRPC config for type.googleapis.com/envoy.api.v2.Listener rejected: Error adding/updating " +
			"listener …", "config rejected", "Proto constraint validation failed"},
	AccessLogUnwritable: {"unable to open file '…': Permission denied"},
	ServerFirst:         {"Connections to MySQL, SMTP or FTP servers hang"},
	EndpointsPanic:      {"lb_healthy_panic"},
	ApplicationSilent: {"upstream connect error or disconnect/reset before headers. reset reason: " +
		"connection failure"},
	NoRoute:       {"Network is unreachable"},
	ConntrackFull: {"nf_conntrack: table full, dropping packet"},
	ToolsMissing:  {"iptables: command not found"},
	FamilyUnusable: {"can't initialize ip6tables table `nat': Table does not exist (do you need to " +
		"insmod?)"},
	RuleRefused: {"Another app is currently holding the xtables lock",
		"chain `OUTPUT' in table `nat' is incompatible, use 'nft' tool.",
		"No chain/target/match by that name."},
	Bootstrap:          {"bootstrap-last-failure", "install Envoy: …"},
	GuestAttributesOff: {"Guest attributes endpoint access is disabled."},
	ListenAddress:      {"bind: address already in use"},
}

// besides is what a section has behind its table.
var besides = map[ID]string{
	Bootstrap: `
The guest attribute ` + "`bootstrap-last-failure`" + ` has these words, too, and at once. They begin with
the step. Bootstrap tries again by itself: what may pass within a minute, the rest when the
attribute changes, and every five minutes.

| step, and words behind it | next step |
|---|---|
| **look at the system:** | the words behind the last ; are the way out; ` +
		"[systems.md](systems.md) has all that a system needs" + ` |
| **read the attribute:** | as for [attribute-malformed](#attribute-malformed), ` +
		"or where the metadata server does not answer [metadata-server](#metadata-server)" + ` |
| **read the VM's metadata:** | as for [metadata-server](#metadata-server) |
| **install units and users:** | make room on the disk, or the folder writable |
| **install packages:** … ` + "`missing on this image`" + ` | give the VM a way to its distribution's repositories (Cloud NAT: Private Google Access leads to Google alone), or take an image that has iptables and ca-certificates |
| **install Envoy:** … ` + "`status 403 Forbidden`" + `, of gs:// | grant roles/storage.objectViewer on the bucket to the VM's service account; the VM needs the scope cloud-platform or devstorage.read_only, too. An object that is not there is told so as well |
| … ` + "`status 404 Not Found`" + ` | correct primary-source in the attribute, or upload the archive |
| … ` + "`the VM has no service account to read Cloud Storage with`" + ` | stop the VM and give it one, with the scope cloud-platform |
| … ` + "`wrong checksum`" + ` | upload the archive anew with its .sha256, or correct #sha256= behind the URL |
| … ` + "`bad archive`" + ` | upload a whole .tgz that holds usr/local/bin/envoy |
| … ` + "`i/o timeout`, `no route to host`" + ` | the VM has no way out to TCP 443: Private Google Access (for gs://), Cloud NAT, the firewall |
| … ` + "`there is no Envoy: none on this VM`" + ` | install an archive or a package that brings Envoy, or give primary-source |
| **make the log files:** | give access-log a path in a folder that exists |
| **configure Envoy:** … ` + "`refuses its configuration`" + ` | take another Envoy by primary-source; else this is a fault of bootstrap's: please open an issue |
| **start Envoy:** | see /var/log/envoy/envoy.err.log and ` + "`journalctl -u service-proxy-envoy`" + ` |
| anything with ` + "`no space left on device`" + ` | make room on that disk |
`,
}

// TestDocument: docs/symptoms.md says what the program says. `-update` writes it anew.
func TestDocument(t *testing.T) {
	was, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	_, hand, found := strings.Cut(string(was), byHand)
	if !found {
		t.Fatalf("%s has lost the line %q", document, strings.TrimSpace(byHand))
	}
	text := findings(t) + byHand + hand
	if *update {
		if err := os.WriteFile(document, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if text != string(was) {
		t.Error("docs/symptoms.md is not what the program says: write it with -update")
	}
}

// findings is the part that is made of Kinds and of the examples' words.
func findings(t *testing.T) string {
	var doc strings.Builder
	doc.WriteString(`# What the agent says, and what to do

| severity | told in |
|---|---|
| error | the guest attribute ` + "`agent-last-failure`" + `, serial port 1, Cloud Logging, the log |
| warning | the same, the guest attribute only while no error lasts (and ` +
		"`guest-attributes-off`" + ` not there) |
| advice | ` + "`status` and `doctor`" + ` alone |

All have a series, ` + "`service_proxy_agent_finding{id=…,severity=…}`" + `, which is 0 while the finding does
not stand.

    gcloud compute instances get-guest-attributes VM --query-path=gce-service-proxy/
    sudo service-proxy-agent status     on the VM: all of it, and what follows from what
    sudo service-proxy-agent doctor     every check, without the daemon, with commands to paste
    sudo service-proxy-agent explain ADDRESS:PORT     where one connection goes, and why
    sudo service-proxy-agent diff       the rules that should be there against those that are

What follows from another finding is listed under it in ` + "`status` and `doctor`" + `, and told
nowhere else: mend the first one. Alerts that are not a finding's are in
[the last part](#what-only-a-scrape-shows).

This page is made by ` + "`go test ./internal/symptom -update`" + ` from the program's own words, with
examples for names and addresses. The number of a row is a name for the situation, the same in
[What was measured](#what-was-measured); you need it for nothing else. What ` +
		"`agent-status`" + ` says is
in [its part](#state-of-agent-status).

| id | severity | what is wrong |
|---|---|---|
`)
	listed := map[ID]bool{}
	for _, s := range sections {
		for _, id := range s.ids {
			k := kindOf(t, id)
			if listed[id] {
				t.Errorf("%s is in two sections", id)
			}
			listed[id] = true
			fmt.Fprintf(&doc, "| [`%s`](#%[1]s) | %s | %s |\n", id, severities(k), k.Title)
		}
	}
	for _, k := range Kinds() {
		if !listed[k.ID] {
			t.Errorf("%s is in no section", k.ID)
		}
	}
	for _, s := range sections {
		fmt.Fprintf(&doc, "\n## %s\n", s.title)
		if s.intro != "" {
			fmt.Fprintf(&doc, "\n%s\n", s.intro)
		}
		for _, id := range s.ids {
			entry(t, &doc, kindOf(t, id))
		}
	}
	return doc.String()
}

// entry is one finding's part. Its heading is its anchor.
func entry(t *testing.T, doc *strings.Builder, k Kind) {
	fmt.Fprintf(doc, "\n### `%s`\n\n%s. (%s)\n", k.ID, k.Title, severities(k))
	for i, words := range alsoTold[k.ID] {
		if i == 0 {
			doc.WriteString("\nAlso told as:\n\n")
		}
		mark := "`"
		if strings.Contains(words, mark) {
			mark = "``"
		}
		fmt.Fprintf(doc, "- %s%s%[1]s\n", mark, words)
	}
	if k.ID == Starting { // no check finds it, and so it has no example
		doc.WriteString("\n`status` answers so before the first pass has ended: ask again in a second.\n")
		return
	}
	doc.WriteString("\n| when | row | severity | it says | next step |\n|---|---|---|---|---|\n")
	cell := func(s string) string {
		if s == "" {
			return "–"
		}
		return strings.ReplaceAll(s, "|", `\|`)
	}
	for _, e := range examples {
		if e.want != k.ID {
			continue
		}
		all := Check(e.facts)
		if len(all) == 0 {
			t.Errorf("%s: no finding", e.when)
			continue
		}
		f, row := all[0], "–"
		if f.Row != 0 {
			row = fmt.Sprint(f.Row)
		}
		fmt.Fprintf(doc, "| %s | %s | %v | %s | %s |\n", e.when, row, f.Severity, cell(f.Cause),
			cell(f.Next))
	}
	doc.WriteString(besides[k.ID])
}

func kindOf(t *testing.T, id ID) Kind {
	i := slices.IndexFunc(Kinds(), func(k Kind) bool { return k.ID == id })
	if i < 0 {
		t.Fatalf("%s is no kind", id)
	}
	return Kinds()[i]
}

func severities(k Kind) string {
	var all []string
	for _, s := range k.Severities {
		all = append(all, s.String())
	}
	return strings.Join(all, ", ")
}

// TestPagesAreReadElsewhere: a VM has no docs/, so findings name pages by their address.
func TestPagesAreReadElsewhere(t *testing.T) {
	page, seen := regexp.MustCompile(`[^\s(]*\bdocs/[\w./-]*\w`), 0
	for _, e := range examples {
		for _, f := range Check(e.facts) {
			for _, named := range page.FindAllString(f.Cause+" "+f.Next, -1) {
				seen++
				name, found := strings.CutPrefix(named, DocsURL)
				if _, err := os.Stat("../../docs/" + name); !found || err != nil {
					t.Errorf("%s: %s is no page (%v)", e.when, named, err)
				}
			}
		}
	}
	if seen < 2 {
		t.Errorf("only %d pages are named", seen)
	}
}
