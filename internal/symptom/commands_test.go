package symptom

import (
	"errors"
	"net/netip"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// placeholders are for what nobody knows, or no terminal shows. They cannot be taken for a name.
var placeholders = regexp.MustCompile(`\b(PROJECT|VM|ZONE|ACCOUNT|FILE|SOCKET|URL|FOLDER|HOST|USER|CHAIN|TABLE|FAMILY|BACKEND_SERVICE)\b`)

// TestEvidence: each finding says what it was found by, and gives a command to paste; on a VM that
// knows itself with nothing to fill in but a file of one's own, or one of several services.
func TestEvidence(t *testing.T) {
	for _, e := range examples {
		for _, f := range Check(e.facts) {
			if len(f.Evidence) == 0 || len(f.Commands) == 0 {
				t.Errorf("%s: %s has evidence %q and commands %q", e.when, f.ID, f.Evidence, f.Commands)
			}
			for _, seen := range f.Evidence {
				if !slices.Contains(sources(t), seen.Source) || seen.Text == "" {
					t.Errorf("%s: %+v", e.when, seen)
				}
			}
			for _, command := range f.Commands {
				open := placeholders.FindAllString(command, -1)
				if len(open) > 0 && open[0] != "FILE" && open[0] != "BACKEND_SERVICE" ||
					strings.Contains(command, "%!") {
					t.Errorf("%s: %s: to fill in: %s", e.when, f.ID, command)
				}
			}
		}
	}
}

// TestCommands: the commands of this VM, written by hand.
func TestCommands(t *testing.T) {
	const where = "web-1 --zone=europe-west1-b --project=my-project"
	port := func(f *Facts) {
		f.Ports = []Port{{Family: iptables.IPv4, Purpose: "outbound interception",
			Addr: netip.MustParseAddrPort("127.0.0.1:15001"), Owner: 4711, Listening: true}}
	}
	for _, tt := range []struct {
		facts Facts
		id    ID
		want  string
	}{
		{stream(7, "API has not been used in project 4711 before or it is disabled"), APINotEnabled,
			"gcloud services enable trafficdirector.googleapis.com --project=4711"},
		{stream(7, "no"), PermissionDenied, "gcloud projects add-iam-policy-binding my-project " +
			"--member=serviceAccount:web@my-project.iam.gserviceaccount.com --role=roles/trafficdirector.client"},
		{with(stream(7, "no"), presents("4711", "default")), PermissionDenied,
			"gcloud projects add-iam-policy-binding 4711 --member=…"},
		{with(stream(7, "no"), func(f *Facts) { f.VM, f.Account, f.Scopes = VM{}, "", nil }), PermissionDenied,
			"gcloud projects add-iam-policy-binding PROJECT --member=serviceAccount:ACCOUNT --role=…"},
		{with(stream(7, "no"), func(f *Facts) { f.Scopes = []string{} }), ScopeMissing,
			"gcloud compute instances stop " + where},
		{with(stream(7, "no"), func(f *Facts) { f.Scopes = []string{} }), ScopeMissing,
			"gcloud compute instances set-service-account " + where + " --scopes=" + cloudPlatform},
		{stream(5, "no"), ConfigNotFound, "gcloud compute forwarding-rules list --global --project=my-project …"},
		{live(func(f *Facts) { f.GuestOff = true }), GuestAttributesOff,
			"gcloud compute instances add-metadata " + where + " --metadata=enable-guest-attributes=TRUE"},
		{live(func(f *Facts) { f.GuestOff, f.VM = true, VM{} }), GuestAttributesOff,
			"gcloud compute instances add-metadata VM --zone=ZONE --project=PROJECT --metadata=…"},
		{live(func(f *Facts) { f.Attribute = malformed }), AttributeBad,
			"gcloud compute instances add-metadata " + where + " --metadata-from-file=gce-service-proxy=FILE"},
		{live(port), ForeignOwner, "sudo ss -ltunp 'sport = :15001'"},
		{live(func(f *Facts) { port(f); f.Processes = []uint32{4711} }), EnvoyOtherUser, "ps -fu 4711"},
		{family(func(f *Family) { f.Family, f.Unusable = iptables.IPv6, iptables.ErrNoTable }), FamilyUnusable,
			"sudo modprobe ip6table_nat"},
		{family(func(f *Family) { f.Family, f.Unusable = iptables.IPv6, iptables.ErrNoIPTables }), FamilyUnusable,
			"sudo sh -c 'apt-get update && apt-get install -y iptables …"},
		{family(func(f *Family) {
			f.Left = []iptables.RefusedError{{Stderr: "ip6tables-restore v1.8.9 (legacy): Couldn't load match `addrtype':No such file or directory"}}
		}), RuleRefused, "sudo modprobe -a xt_addrtype"},
		{family(func(f *Family) {
			f.Left = []iptables.RefusedError{{Stderr: "Warning: Extension owner revision 0 not supported, missing kernel module?"}}
		}), RuleRefused, "sudo modprobe -a nft_compat xt_owner"},
		{family(func(f *Family) { // Debian 11's, without xt_REDIRECT
			f.Err = errors.New(`iptables-restore v1.8.7 (nf_tables): unknown option "--to-ports"; Error occurred at line: 11`)
		}), RuleRefused, "sudo modprobe -a nft_compat xt_REDIRECT"},
		{family(func(f *Family) { // Debian 12's iptables-nft, on a kernel without nft_compat
			f.Err = errors.New("IPv4 rule refused: line 8 \"-A X -p tcp -j RETURN\": Warning: Extension tcp revision 0 not " +
				"supported, missing kernel module?; Warning: Extension comment revision 0 not supported, missing kernel " +
				"module?; Warning: Extension comment revision 0 not supported, missing kernel module?")
		}), RuleRefused, "sudo modprobe -a nft_compat xt_tcp xt_comment"},
		{family(func(f *Family) { // and without nft_chain_nat
			f.Err = errors.New("IPv4 rule refused: line 22 \"-I PREROUTING 1 -p tcp -j X\": iptables-restore v1.8.9 " +
				"(nf_tables):; line 22: CHAIN_ADD failed (No such file or directory): chain PREROUTING")
		}), RuleRefused, "sudo modprobe nft_chain_nat"},
		{family(func(f *Family) { f.Fighting, f.By = true, "firewalld (pid 4711)" }), Fight, "ps -fp 4711"},
		{family(func(f *Family) {
			f.Family, f.Shadow = iptables.IPv6, []iptables.Drift{{Chain: "PREROUTING", Rule: "-j X"}}
		}), Shadowed, "sudo ip6tables -t nat -L PREROUTING -n -v --line-numbers"},
		{live(func(f *Facts) { f.Conntrack = Conntrack{Count: 9, Max: 10} }), ConntrackFull,
			"sudo sysctl -w net.netfilter.nf_conntrack_max=20"},
		{live(func(f *Facts) { f.Agent.Killed = now }), AgentStuck,
			"sudo journalctl -u service-proxy-agent --since='2026-01-02 03:03:05 UTC' --until='2026-01-02 03:05:05 UTC'"},
		{live(func(f *Facts) {
			f.Envoy.Admin, f.Envoy.Err = "unix:///run/envoy admin.sock", envoyadmin.ErrTimeout
		}), AdminUnreadable, "sudo curl -sS -m 5 --unix-socket '/run/envoy admin.sock' http://envoy/server_info"},
		{live(func(f *Facts) {
			f.Envoy.Rejected = []envoyadmin.Rejected{{Name: "l", Details: "unable to open file '/a b': no"}}
		}), AccessLogUnwritable, "sudo ls -ld -- '/a b'"},
		{live(func(f *Facts) { f.Silent = []uint16{8080} }), ApplicationSilent, "sudo ss -ltunp 'sport = :8080'"},
		{live(func(f *Facts) { f.Brake = Brake{Off: true, By: ByInstance} }), InterceptionOff,
			"gcloud compute instances remove-metadata " + where + " --keys=service-proxy-agent-interception"},
		{live(func(f *Facts) { f.Brake = Brake{Off: true, By: ByProject} }), InterceptionOff,
			"gcloud compute project-info remove-metadata --project=my-project --keys=service-proxy-agent-interception"},
		{live(func(f *Facts) { f.Brake = Brake{Bad: "x", BadBy: ByProject} }), InterceptionKey,
			"gcloud compute project-info remove-metadata --project=my-project --keys=service-proxy-agent-interception"},
		{live(func(f *Facts) { f.Brake = Brake{Bad: "x", BadBy: ByProject} }), InterceptionKey,
			"curl …/computeMetadata/v1/project/attributes/service-proxy-agent-interception; echo"},
		{live(func(f *Facts) { f.ClosedAgent = &ClosedAgent{} }), ClosedAgentHere,
			"sudo service-proxy-agent bootstrap --take-over"},
		{live(func(f *Facts) {
			f.Others = []iptables.OtherChain{{Backend: "legacy", Family: "ip6", Table: "nat", Chain: "OUTPUT"}}
		}), OtherChain, "sudo ip6tables-legacy -t nat -S"},
	} {
		findings := Check(tt.facts)
		i := slices.IndexFunc(findings, func(f Finding) bool { return f.ID == tt.id })
		if i < 0 || !slices.ContainsFunc(findings[i].Commands, func(c string) bool {
			return says(c, tt.want)
		}) {
			t.Errorf("%s: %+v, want %s", tt.id, findings, tt.want)
		}
	}
}

// TestEnvoyLog: next steps and commands name the log that --envoy-log names, and it is one word.
func TestEnvoyLog(t *testing.T) {
	const file = "/srv/envoy logs/e.log"
	said := map[bool]int{}
	for _, e := range examples {
		for _, set := range []bool{false, true} {
			f := e.facts
			if set {
				f.EnvoyLog = file
			}
			f.Envoy.LogErr = strings.ReplaceAll(f.Envoy.LogErr, defaultLog, file)
			for _, found := range Check(f) {
				text := found.Next + "\n" + strings.Join(found.Commands, "\n")
				if set && (strings.Contains(text, defaultLog) || strings.Contains(text, "/var/log/envoy ")) {
					t.Errorf("%s: %s: another log is in force: %s", e.when, found.ID, text)
				}
				said[set] += strings.Count(text, defaultLog) + strings.Count(text, file)
				for _, command := range found.Commands {
					if strings.Contains(command, file) && !strings.Contains(command, "'"+file+"'") {
						t.Errorf("%s: %s: the path is no single word: %s", e.when, found.ID, command)
					}
				}
			}
		}
	}
	if said[false] != said[true] || said[true] < 10 {
		t.Errorf("the log is named so often: %v", said)
	}
}

// TestStrangerIsNotTrusted: whoever answers as an Envoy while that is down gets the VM's traffic by
// no command that is to be pasted.
func TestStrangerIsNotTrusted(t *testing.T) {
	for _, found := range Check(live(func(f *Facts) {
		f.Processes = []uint32{4711}
		f.Ports = append(f.Ports, Port{Addr: netip.MustParseAddrPort("127.0.0.1:15001"), Owner: 4711,
			OwnerName: "mallory", Listening: true})
	})) {
		for _, c := range found.Commands {
			if strings.Contains(c, "mallory") || strings.Contains(c, "PROXY_USER") {
				t.Errorf("%s: %s", found.ID, c)
			}
		}
	}
}

// TestSince: what knows since when says so.
func TestSince(t *testing.T) {
	for id, f := range map[ID]Facts{
		EnvoyDown:       live(func(f *Facts) { f.Envoy.Err, f.Envoy.Since = envoyadmin.ErrRefused, now }),
		AdminUnreadable: live(func(f *Facts) { f.Envoy.Err, f.Envoy.Since = envoyadmin.ErrTimeout, now }),
		AgentStuck:      live(func(f *Facts) { f.Agent.Killed = now }),
		InterceptionOff: live(func(f *Facts) { f.Brake = Brake{Off: true, Since: now} }),
		OtherVMsState:   live(func(f *Facts) { f.Discarded = &Discarded{At: now} }),
	} {
		if got := Check(f)[0]; got.ID != id || !got.Since.Equal(now) {
			t.Errorf("%+v", got)
		}
	}
	// Envoy tries again and again: the last time is no beginning.
	got := Check(stream(7, "no"))[0]
	want := Evidence{FromEnvoyLog, now,
		"gRPC config stream to trafficdirector.googleapis.com:443 closed: 7, no"}
	if !got.Since.IsZero() || got.Evidence[0] != want {
		t.Errorf("%+v", got)
	}
}

// TestWord: a real shell takes what others have named for one word, and for that one.
func TestWord(t *testing.T) {
	for s, want := range map[string]string{
		"web-1": "web-1", "serviceAccount:a@b.c": "serviceAccount:a@b.c", "": "X", "-rf": "X",
		"a\nb": "X", "\x1b[2J": "X", "\xff": "X", "\u202e": "X", strings.Repeat("a", 201): "X",
		"a b": "'a b'", "a'b": `'a'\''b'`, "$(id)": "'$(id)'", "`id`": "'`id`'", "*": "'*'", "~": "'~'",
		"a;b|c&d>e": "'a;b|c&d>e'", `a\`: `'a\'`, "ü": "'ü'", "!!": "'!!'", "#a": "'#a'", "{a,b}": "'{a,b}'",
	} {
		got := word(s, "X")
		if got != want {
			t.Errorf("%q: %s, want %s", s, got, want)
		}
		if got == "X" {
			continue
		}
		out, err := exec.Command("sh", "-c", "printf %s. "+got).Output()
		if err != nil || string(out) != s+"." {
			t.Errorf("%q: sh makes %q of %s: %v", s, out, got, err)
		}
	}
}
