package symptom

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strings"
	"testing"
)

// meanings are what the findings of a kind mean for the VM's traffic, whatever the details: the
// journal's catalog says it beside the cause and the next step of the failure at hand.
var meanings = map[ID]string{
	EnvoyDown: `Nothing answers on Envoy's admin address. Connections to services are refused while
the rules lead to its port, unless the agent runs with --when-envoy-down=bypass, which takes the
jumps out until Envoy accepts again. systemd restarts Envoy by itself.`,
	EnvoyNotConfigured: `Envoy runs, and the control plane has sent it no listeners. The rules stay
as they are, so what worked before goes on where Envoy still has it. On a new VM nothing is
intercepted yet.`,
	ControlPlaneLookUp: `Without the control plane Envoy keeps the configuration it has and gets no
changes. An Envoy that has just started has none. DNS on the VM is the first thing to look at.`,
	ControlPlaneConnect: `Without the control plane Envoy keeps the configuration it has and gets no
changes. An Envoy that has just started has none.`,
	APINotEnabled: `The control plane answers nobody of this project until the API is enabled. It
takes effect some minutes later, and nothing has to be restarted on the VM.`,
	PermissionDenied: `The control plane knows the VM's service account and does not give it a
configuration. A role that is granted takes effect within minutes, and nothing has to be restarted
on the VM.`,
	ScopeMissing: `The token that the VM's metadata server gives Envoy is not good for the control
plane. No role helps while the scope is missing, and scopes change only on a stopped VM.`,
	ConfigNotFound: `The control plane has no configuration under the name of the network, scope or
mesh that this VM asks for: it does not exist yet, or the name in the attribute is another one.`,
	ControlPlaneRefused: `The control plane ended Envoy's stream with a reason of its own. Envoy
tries again by itself, and keeps the configuration it has until then.`,
	ListenerRejected: `Envoy goes on with the last version of the listener that it took. What is new
in the rejected one is not served and not intercepted.`,
	AccessLogUnwritable: `Envoy takes no listener whose access log it cannot open. It goes on with
the last version that it took; what is new is not served and not intercepted.`,
	DriftRepaired: `Something on the VM changed, moved or removed rules of ours. They were put back
in one transaction. Connections that began in between may have gone to the raw address.`,
	ProxyUser: `The rules let Envoy's own traffic out by the user that it runs as. Without that user
it would be led back to Envoy for ever, so nothing is intercepted.`,
	FamilyUnusable: `The kernel or the image lacks what the rules of this address family need. Its
traffic goes to the raw addresses. The other family is not affected.`,
	RuleRefused: `The kernel or iptables did not take rules that are wanted. What is in place stays
in place, what was refused is missing, and it is tried again.`,
	CouldNotLook: `The agent writes nothing that it has not compared with what is there. Until a look
succeeds the rules stay as they are, and changes of the services wait.`,
	Shadowed: `A rule that comes first takes packets that should go to Envoy. They go past the mesh:
without its load balancing, security and telemetry.`,
	Fight: `Another program undoes our rules as often as they are put back. Repairs wait between two
tries, so traffic goes past the mesh part of the time.`,
	ServingPortNoChain: `Connections to the port from outside reach the application without Envoy. As
soon as the control plane sends an inbound listener for it, they go through Envoy.`,
	ServerFirst: `Envoy waits for the client's first bytes to see what the protocol is, and the
client waits for the server's: the connection hangs until a timeout.`,
	EnvoyTooOld: `This version of Envoy lacks something that the agent or the control plane counts
on, or fixes that a proxy should have.`,
	Bootstrap: `Installing or configuring Envoy did not succeed. It is tried again by itself. What
ran before goes on; on a new VM nothing is intercepted yet.`,
	AttributeBad: `The VM's metadata attribute gce-service-proxy says how this VM takes part in the
mesh. This one cannot be read. A correction takes effect within seconds.`,
	AttributeAdvice: `The attribute is in force as it stands. What it asks for works against the VM
or those who look after it.`,
	MetadataServer: `The attribute, tokens and the guest attributes all come and go by the metadata
server. What is in force stays in force.`,
	GuestAttributesOff: `The agent works as always; only its status cannot be read from outside by
guest attributes. Serial port 1, the logs and /metrics have it.`,
	ForeignOwner: `Who listens on a port that the rules lead to, or answers there as Envoy, could
read what was meant for the mesh. So the jumps are out, and traffic goes to the raw addresses.`,
	OtherChain: `A chain of another program may translate addresses before the rules of the agent see
the packet.`,
	ResolverLoop: `With intercept-dns the VM's DNS questions go to Envoy, which asks the VM's
resolver. A resolver whose own questions are not let out asks Envoy again.`,
	InterceptionNotReady: `Jumps to a closed port would refuse connections, so they are put in only
when Envoy accepts there. Until then traffic goes to the raw addresses.`,
	AdminUnreadable: `The services are read from Envoy's admin interface. Until it gives a usable
answer the rules stay as they are, and changes of the services wait.`,
	EntryRefused: `Some addresses and ports are never intercepted, whatever a listener says, because
the VM could not be reached or could not work any more. All else of the listener is in force.`,
	ListenerSkipped: `Envoy serves the listener. The agent makes no rules for it, so only who asks
its address itself reaches it.`,
	LogUnreadable: `Interception goes on. Changes are seen a little later, and the reasons that the
control plane gives are not known.`,
	ListenAddress: `Interception goes on. Health checks and scrapes of the VM get no answer, or
another program's.`,
	EnvoyOtherUser: `The rules let Envoy's own traffic out by the user that it runs as. What another
user's Envoy sends would come back to it for ever, so the jumps are out and traffic goes to the raw
addresses.`,
	RulesDiffer: `What the kernel has is not what Envoy's services need, and no agent runs that would put
it right: some traffic goes past the mesh, or into a port where nobody waits for it.`,
	InputDropped: `Clients of this VM get no answer on that port. The agent's rules come before table
filter, so that sees Envoy's inbound port where the serving port is redirected.`,
	ApplicationSilent: `Envoy accepts the connection and finds nobody behind it: clients get an error
(503), and health checks through Envoy fail.`,
	EndpointsPanic: `Below half of its endpoints healthy Envoy takes none of them out any more and sends
to all. Part of the requests fail, and those that succeed overload who is left.`,
	EndpointsUnhealthy: `Traffic goes to those that are left, which may be in another zone: slower, and
paid for.`,
	AgentStuck: `An agent that hangs repairs nothing and follows no change. The rules stay in the kernel
as they are. Its loop has a limit for every question, so the stack is worth a report.`,
	EnvoyIdentity: `The control plane chooses an Envoy's configuration by the network and the project
that it presents in its node. With another one it gets another configuration, or none.`,
	ClockWrong: `Certificates and tokens are not valid yet, or not any more, to a clock that is wrong.
Envoy keeps the connections it has, and cannot make new ones to the control plane.`,
	OldConnections: `Whether a connection is intercepted is decided when it begins. These began before
there were rules for their service, and stay as they are until they end.`,
	ConntrackFull: `Each new connection needs an entry. While there is none left the kernel drops its
first packet: clients see timeouts, on services of the mesh and on all others.`,
	NoRoute: `The kernel looks for a route before the rules see the packet. Without one connect fails at
once (network is unreachable), whatever Envoy knows.`,
	EnvoyNotOurs: `Another program started the Envoy that answers, with another configuration. What it
gets from its control plane is not what this VM was set up for.`,
	ToolsMissing: `The rules are written by iptables and ip6tables. Bootstrap installs them where the
package manager has them; until then nothing is intercepted.`,
	ClosedAgentHere: `Google's agent has the names of ours: its unit, its chains, its guest attributes. Two
that write the same undo each other, so one of them has to go. This one changes nothing of the other
until somebody asks it to.`,
	OtherVMsState: `The disk was made from another VM's, with what its agent kept: none of it is this
VM's. The agent has thrown it away, and goes by this VM's metadata alone.`,
	InterceptionOff: `Somebody wants it so, for this VM or for all of its project. The chains and what
goes through Envoy already stay; new connections go to the raw addresses, past the mesh. Without the
key the jumps come back within seconds.`,
	InterceptionKey: `The key that turns interception off has a value that the agent does not know, so
it does what it did before: interception goes on as it was.`,
	Starting: `The first look at Envoy and at the kernel has not ended. This passes within seconds.`,
}

const (
	catalogFile   = "../../systemd/catalog/service-proxy-agent.catalog"
	messageIDFile = "testdata/message-ids.golden"
	home          = "https://github.com/service-proxy-agent/service-proxy-agent"
)

// catalog is the journal's catalog (systemd.io/CATALOG): an entry for each kind and one for what is
// over. journalctl puts the fields of the entry at hand in place of @…@.
func catalog() string {
	var out strings.Builder
	out.WriteString("# Made by `go test ./internal/symptom -update`. " +
		"`journalctl -x` shows these words.\n")
	entry := func(id ID, anchor, title, about string) {
		fmt.Fprintf(&out, "\n-- %s\nSubject: %s\nDefined-By: service-proxy-agent\n"+
			"Support: %s/issues\nDocumentation: %ssymptoms.md%s\n\n%s\n",
			id.MessageID(), title, home, DocsURL, anchor, about)
	}
	for _, k := range Kinds() {
		entry(k.ID, "#"+string(k.ID), k.Title, wrap(meanings[k.ID])+
			"\n\nCause: @SERVICE_PROXY_CAUSE@\nNext step: @SERVICE_PROXY_NEXT@")
	}
	entry(Over, "", "What was wrong is over",
		"A failure that was told before is not there any more: @SERVICE_PROXY_ID@.\n"+
			"`journalctl SERVICE_PROXY_ID=@SERVICE_PROXY_ID@` shows when it came and went.")
	return out.String()
}

// wrap puts a text into lines that are whole on a terminal of 80 columns: journalctl puts "-- "
// before each.
func wrap(text string) string {
	var out strings.Builder
	column := 0
	for word := range strings.FieldsSeq(text) {
		switch {
		case column == 0:
		case column+len(word) > 75:
			out.WriteByte('\n')
			column = 0
		default:
			out.WriteByte(' ')
			column++
		}
		out.WriteString(word)
		column += len(word)
	}
	return out.String()
}

// TestCatalog: the catalog that is installed has these words, of every kind.
func TestCatalog(t *testing.T) {
	known := map[ID]bool{}
	for _, k := range Kinds() {
		known[k.ID] = true
		if meanings[k.ID] == "" {
			t.Errorf("%s has no meaning", k.ID)
		}
	}
	for id, text := range meanings {
		if !known[id] {
			t.Errorf("%s is no kind", id)
		}
		if !strings.HasSuffix(text, ".") || strings.Contains(text, "@") {
			t.Errorf("%s: the catalog cannot have %q", id, text)
		}
	}
	want := catalog()
	if *update {
		if err := os.WriteFile(catalogFile, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if have, err := os.ReadFile(catalogFile); err != nil || string(have) != want {
		t.Errorf("%s is not what the program says (%v): run go test ./internal/symptom -update",
			catalogFile, err)
	}
}

// TestMessageIDs: no message ID that was written down ever changes or goes, with -update neither:
// it adds those that are new.
func TestMessageIDs(t *testing.T) {
	text, err := os.ReadFile(messageIDFile)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	ids := []ID{Over}
	for _, k := range Kinds() {
		ids = append(ids, k.ID)
	}
	have, seen := map[ID]string{}, map[string]ID{}
	for _, id := range ids {
		have[id] = id.MessageID()
		if other, twice := seen[have[id]]; twice ||
			!regexp.MustCompile(`^[0-9a-f]{12}5[0-9a-f]{3}[89ab][0-9a-f]{15}$`).MatchString(have[id]) {
			t.Errorf("%s: %q is no UUID of version 5, or that of %q, too", id, have[id], other)
		}
		seen[have[id]] = id
	}
	for line := range strings.Lines(string(text)) {
		message, id, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok || have[ID(id)] != message {
			t.Errorf("%q was released, and is %q now", strings.TrimSpace(line), have[ID(id)])
		}
		delete(have, ID(id))
	}
	for _, id := range ids {
		if message, isNew := have[id]; isNew {
			text = append(text, message+" "+string(id)+"\n"...)
			if !*update {
				t.Errorf("%s is new: run go test ./internal/symptom -update", id)
			}
		}
	}
	if *update && !t.Failed() {
		if err := os.WriteFile(messageIDFile, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
