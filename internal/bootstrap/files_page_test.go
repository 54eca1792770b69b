package bootstrap

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/internal/logs"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/supervisor"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// Who writes.
const (
	byBootstrap  = "bootstrap"
	byDaemon     = "the daemon"
	bySystemd    = "systemd"
	bySupervisor = "Envoy's supervisor"
	byYou        = "you"
)

// place is a file, a folder with all beneath it (it ends in /), or a pattern.
type place struct {
	path  string
	owner string // user:group
	mode  string
	by    string
	why   string
}

// group is a part of the page.
type group struct {
	title, intro string
	places       []place
}

// keptFolder is bootstrap's own.
var keptFolder = filepath.Dir(previousDir)

const ours, envoys, roots = AgentUser + ":" + AgentUser, EnvoyUser + ":" + EnvoyUser, "root:root"

// places are all that is written on a VM. TestWritesOnlyWhatIsListed holds those of bootstrap, with
// their modes, against what it writes.
var places = []group{
	{"Programs and their pages", "", []place{
		{"/usr/local/bin/service-proxy-agent", roots, "0755", byBootstrap, "the program"},
		{EnvoyBinary, roots, "0755", byBootstrap, "Envoy; one that was here before is left"},
		{keptFolder + "/", roots, "0755", byBootstrap, "what belongs to no other folder"},
		{keptFolder + "/archive/envoy", roots, "0755", byBootstrap, "the Envoy that came with the archive"},
		{previousDir + "/", roots, "0755", byBootstrap,
			"what the last upgrade replaced, for `--rollback`"},
		{rolledBackFile, roots, "0644", byBootstrap,
			"what `--rollback` took out, so that it is not installed again"},
		{handoverDir + "/", roots, "0755", byBootstrap,
			"what a take-over found, for `--remove` ([take-over.md](take-over.md))"},
		{"/usr/local/share/man/man8/service-proxy-agent*.8", roots, "0644", byBootstrap, "the manual"},
		{"/usr/local/share/bash-completion/completions/service-proxy-agent", roots, "0644", byBootstrap,
			"completion in bash"},
		{"/usr/local/share/zsh/site-functions/_service-proxy-agent", roots, "0644", byBootstrap,
			"the same in zsh"},
		{"/etc/fish/completions/service-proxy-agent.fish", roots, "0644", byBootstrap,
			"the same in fish, where that is installed: it does not look beneath /usr/local"},
	}},
	{"Units", "", unitPlaces()},
	{"Settings", "", []place{
		{"/etc/default/service-proxy-agent", roots, "yours", byYou,
			"settings of the daemon ([settings.md](settings.md)); nothing writes or removes it"},
		{filepath.Dir(EnvoyConfig) + "/", roots, "0755", byBootstrap,
			"your web config file may lie here, too: it stays"},
		{EnvoyConfig, "root:" + EnvoyUser, "0640", byBootstrap,
			"Envoy's configuration; Envoy may read it, and not write it"},
		{progress.OwnerFile, roots, "0644", byBootstrap,
			"whose it is: no Envoy starts with that of the VM whose disk was copied"},
	}},
	{"State", "It outlives a reboot. [images.md](images.md) says what of it is one VM's.", []place{
		{progress.StateDir + "/", ours, "0700", bySystemd, "what daemon and bootstrap keep"},
		{progress.StateDir + "/" + progress.StateFile, roots, "0644", byBootstrap, "how far it came"},
		{progress.StateDir + "/" + progress.AttributeFile, ours, "0600", byDaemon,
			"the last good attribute, for a start without the metadata server"},
		{progress.StateDir + "/" + progress.FailureFile, ours, "0600", byDaemon, "failures that last"},
		{progress.StateDir + "/" + progress.HistoryFile, ours, "0600", byDaemon,
			"transitions, for `status`; 64 kB at most"},
		{progress.StateDir + "/" + progress.BrakeFile, ours, "0600", byDaemon,
			"what the brake's key said last"},
		{retryDirs[0] + "/", roots, "0700", byBootstrap,
			"the archive whose installation failed, until it succeeds (or `" + retryDirs[1] + "`)"},
	}},
	{"Of one boot", "", []place{
		{progress.RuntimeDir + "/", ours, "0755", bySystemd, "what the daemon has while the VM is up"},
		{progress.RuntimeDir + "/agent.sock", ours, "0600", byDaemon,
			"its socket: `status` asks there, and it answers root and its own user"},
		{progress.RuntimeDir + "/agent.lock", ours, "0600", byDaemon, "held by the one that may run"},
		{progress.RuntimeDir + "/" + systemd.ReadyFile, ours, "0644", byDaemon,
			"the VM is ready: " + systemd.ReadyPath + " waits for it"},
		{progress.RuntimeDir + "/intercepting", ours, "0644", byDaemon, "the rules are of this boot"},
		{progress.RuntimeDir + "/instance", ours, "0644", byDaemon, "the VM's id, for the next start"},
		{requestFile, ours, "0600", byDaemon,
			"another run of bootstrap is wanted: " + systemd.BootstrapPath + " waits for it"},
		{budgetFile, ours, "0600", byDaemon,
			"queries for guest attributes that are left, of bootstrap, too"},
		{progress.RuntimeDir + "/" + systemd.HungFile, ours, "0600", bySystemd,
			"its watchdog has ended the daemon"},
		{supervisor.DefaultDir + "/", envoys, "0750", bySystemd, "of Envoy's supervisor"},
		{supervisor.DefaultDir + "/control.sock", envoys, "0600", bySupervisor,
			"its socket: `envoy --reload` asks there"},
		{supervisor.DefaultDir + "/{hot_*,admin-*,kept.json,kept/}", envoys, "0600", bySupervisor,
			"sockets of a hot restart, where each Envoy's admin interface is, what the next starts with"},
		{lockFile, roots, "0600", byBootstrap, "one run at a time"},
		{installLock, roots, "0600", byBootstrap, "one installation at a time"},
		{restartFile, roots, "0600", byBootstrap, "Envoy is to be restarted"},
		{unitChangedFile, roots, "0600", byBootstrap, "and not by a hot restart: its unit is another"},
		{guardFile, roots, "0644", byBootstrap, "a drop-in while a take-over is under way"},
		{rulesGuard, roots, "0644", byBootstrap, "another while `--remove` gives back"},
		{"/run/xtables.lock", "root:" + AgentUser, "0660", bySystemd,
			"iptables' own lock; without the group iptables-legacy fails as the daemon's user"},
	}},
	{"Logs", "", []place{
		{logs.Dir + "/", "root:" + EnvoyUser, "1770", bySystemd,
			"sticky, so that Envoy can write access logs and replace no file of root's"},
		{logs.Dir + "/envoy.err.log", "root:" + EnvoyUser, "0640", bySystemd,
			"Envoy's log, which the daemon follows; rotated at its size by " + systemd.RotateUnit},
		{logs.Dir + "/envoy.out.log", "root:" + EnvoyUser, "0660", bySystemd, "Envoy's stdout"},
	}},
}

func unitPlaces() (all []place) {
	description := regexp.MustCompile(`(?m)^Description=(.*)$`)
	for _, f := range systemd.Files() {
		why := map[string]string{
			"sysusers.d": "the users", "tmpfiles.d": "the folders of state and logs",
			"catalog": "what `journalctl -x` says of our messages",
		}[filepath.Base(filepath.Dir(f.Path))]
		if m := description.FindSubmatch(f.Text); m != nil {
			why = string(m[1])
		}
		all = append(all, place{f.Path, roots, "0644", byBootstrap, why})
	}
	return append(all,
		place{systemd.CatalogDatabase, roots, "0644", "journalctl",
			"the journal's catalogs of all programs; ours is put in"},
		place{systemd.ConfDir + "/{multi-user,paths,timers}.target.wants/service-proxy-*", roots, "link",
			"systemctl", "links that enable the units"},
		place{systemd.AccessLogDropIn(systemd.EnvoyUnit), roots, "0644", byBootstrap,
			"lets Envoy write an access log outside of " + logs.Dir},
		place{systemd.AccessLogDropIn(systemd.RotateUnit), roots, "0644", byBootstrap,
			"lets it be rotated"})
}

const filesPage = "../../docs/files.md"

// TestFilesPage: docs/files.md is made of places. `-update` writes it.
func TestFilesPage(t *testing.T) {
	var b bytes.Buffer
	b.WriteString(`# Files, users and sockets

All that is on a VM because of the agent, as the archive installs it: whose it is, who writes it,
and why. ` + "`bootstrap --remove`" + ` takes it away again, but for what is yours. A folder ends
in /, and all beneath it is of the same sort.

`)
	for _, g := range places {
		fmt.Fprintf(&b, "## %s\n\n", g.title)
		if g.intro != "" {
			fmt.Fprintf(&b, "%s\n\n", g.intro)
		}
		b.WriteString("| path | owner | mode | written by | why |\n|---|---|---|---|---|\n")
		for _, p := range g.places {
			fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", p.path, p.owner, p.mode, p.by, p.why)
		}
		b.WriteByte('\n')
	}
	b.WriteString(`## Users

| user | why |
|---|---|
| ` + "`" + AgentUser + "`" + ` | the daemon, with CAP_NET_ADMIN and ` +
		`CAP_NET_RAW and no other right; member of tty and dialout for the serial port, and of ` +
		EnvoyUser + ` for its log |
| ` + "`" + EnvoyUser + "`" + ` | Envoy: the rules let out what this user sends |

Both are system users without a home or a shell, made by systemd-sysusers. ` + "`--remove`" + `
removes those that bootstrap has made.

## Sockets that listen

| address | who | for whom |
|---|---|---|
| ` + "`" + progress.RuntimeDir + "/agent.sock`" + ` | the daemon | root and the daemon's user |
| ` + "`" + supervisor.DefaultDir + "/control.sock`" + ` | Envoy's supervisor | root, Envoy's user |
| TCP 15020 on all addresses (` + "`--listen`" + `) | the daemon | health checks and scrapes |
| TCP 15000 on 127.0.0.1 | Envoy | its admin interface: every user of the VM |
| TCP 15001, 15006 (` + "`proxy-port`" + ` changes the first) | Envoy | what the rules redirect |
| TCP 15080 on 127.0.0.1 | ` + "`status --serve`" + `, while it runs | who has its link |

## In the kernel

Chains of table nat, IPv4 and IPv6, that begin with ` + "`SERVICE_PROXY_`" + ` and the jumps to them
([the chain graph](design/chains.md)). ` + "`SERVICE_PROXY_PROBE`" + ` is one of them for a
moment, while the kernel is asked whether it takes a rule. ` + "`inet service-proxy-agent-…`" + `
is a table of nft for some seconds after somebody else has changed the chains
([coexistence.md](coexistence.md#streams-while-all-rules-are-flushed)). They go with the unit
` + "`service-proxy-interception.service`" + `, by ` + "`cleanup`" + `, or with a reboot.

This page is made by ` + "`go test ./internal/bootstrap -run TestFilesPage -update`" + `.
`)
	if *update {
		if err := os.WriteFile(filesPage, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if have, err := os.ReadFile(filesPage); err != nil || !bytes.Equal(have, b.Bytes()) {
		t.Errorf("docs/files.md is not what the table of places says (%v): "+
			"go test ./internal/bootstrap -run TestFilesPage -update", err)
	}
}

// TestPlacesOfUnits: owners and modes of what systemd makes are those of its own files.
func TestPlacesOfUnits(t *testing.T) {
	have := map[string]place{}
	for _, g := range places {
		for _, p := range g.places {
			have[strings.TrimSuffix(p.path, "/")] = p
		}
	}
	seen := 0
	holds := func(path, owner, mode string) {
		seen++
		if p := have[path]; p.owner != owner || p.mode != mode || p.by != bySystemd {
			t.Errorf("%s: systemd makes it for %s with %s, the table says %+v", path, owner, mode, p)
		}
	}
	folder := regexp.MustCompile(`(?m)^(Runtime|State)Directory=(.*)$`)
	for _, f := range systemd.Files() {
		if filepath.Base(filepath.Dir(f.Path)) == "tmpfiles.d" {
			for line := range strings.Lines(string(f.Text)) {
				if w := strings.Fields(line); len(w) > 4 && w[0] != "#" {
					holds(w[1], w[3]+":"+w[4], w[2])
				}
			}
		}
		value := func(key string) string {
			m := regexp.MustCompile(`(?m)^` + key + `=(.*)$`).FindSubmatch(f.Text)
			if m == nil {
				t.Fatalf("%s: no %s=", f.Path, key)
			}
			return string(m[1])
		}
		for _, m := range folder.FindAllSubmatch(f.Text, -1) {
			dir := map[string]string{"Runtime": "/run/", "State": "/var/lib/"}[string(m[1])]
			holds(dir+string(m[2]), value("User")+":"+value("Group"), value(string(m[1])+"DirectoryMode"))
		}
	}
	if seen < 7 {
		t.Errorf("only %d of systemd's were found", seen)
	}
}

// checkPlaces holds what bootstrap has written beneath root against the table.
func checkPlaces(t *testing.T, root string, written []string) {
	t.Helper()
	var all []place
	for _, g := range places {
		all = append(all, g.places...)
	}
	for _, path := range written {
		if !slices.ContainsFunc(all, func(p place) bool { return p.covers(path) }) {
			t.Errorf("docs/files.md has no %s", path)
		}
	}
	checked := 0
	for _, p := range all {
		if p.by != byBootstrap {
			continue
		}
		found, err := filepath.Glob(filepath.Join(root, p.path))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range found {
			info, err := os.Lstat(path)
			if err != nil {
				t.Fatal(err)
			}
			checked++
			if mode := fmt.Sprintf("%04o", info.Mode().Perm()); mode != p.mode {
				t.Errorf("%s has mode %s, docs/files.md says %s", p.path, mode, p.mode)
			}
		}
	}
	if checked < 20 {
		t.Errorf("the modes of %d places alone were looked at", checked)
	}
}

// covers says that the path is this one, or beneath this folder, or a folder on the way there.
func (p place) covers(path string) bool {
	for _, pattern := range alternatives(p.path) {
		if ok, err := filepath.Match(strings.TrimSuffix(pattern, "/"), path); ok && err == nil ||
			strings.HasSuffix(pattern, "/") && strings.HasPrefix(path, pattern) ||
			strings.HasPrefix(pattern, path+"/") {
			return true
		}
	}
	return false
}

// alternatives are the paths that one with {a,b} stands for.
func alternatives(path string) []string {
	before, rest, found := strings.Cut(path, "{")
	words, after, closed := strings.Cut(rest, "}")
	if !found || !closed {
		return []string{path}
	}
	var all []string
	for word := range strings.SplitSeq(words, ",") {
		all = append(all, alternatives(before+word+after)...)
	}
	return all
}
