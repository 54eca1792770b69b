package symptom

import (
	"cmp"
	"net"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/service-proxy-agent/service-proxy-agent/iptables"
)

// The commands are for somebody who pastes them as they are. So what others have named comes into
// one by word, which a shell takes for a single word, and nothing is changed or removed by a path
// that others have written: of those the commands only look.

var plain = regexp.MustCompile(`^[A-Za-z0-9_@%+:,./-]+$`)

// word is s as one word of a shell's command line. Where s is empty, would be taken for an option,
// or is not what a terminal shows of it, the word is placeholder.
func word(s, placeholder string) string {
	strange := func(r rune) bool {
		return !unicode.IsPrint(r) || r == utf8.RuneError
	}
	switch {
	case s == "", len(s) > 200, s[0] == '-', strings.ContainsFunc(s, strange):
		return placeholder
	case plain.MatchString(s):
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

func (f Facts) project() string {
	return word(cmp.Or(f.VM.Project, f.VM.ProjectNumber), "PROJECT")
}

// meshProject is the project whose mesh Envoy asks for.
func (f Facts) meshProject() string {
	for _, n := range []*Node{f.Presented, f.Node} {
		if n != nil && n.ProjectNumber != "" && n.ProjectNumber != f.VM.ProjectNumber {
			return word(n.ProjectNumber, "PROJECT")
		}
	}
	return f.project()
}

// instance is `gcloud compute instances VERB` of this VM.
func (f Facts) instance(verb string, flags ...string) string {
	all := append([]string{"gcloud compute instances", verb, word(f.VM.Name, "VM"),
		"--zone=" + word(f.VM.Zone, "ZONE"), "--project=" + f.project()}, flags...)
	return strings.Join(all, " ")
}

// ask is a question to Envoy's admin interface.
func (f Facts) ask(path string) string {
	if socket := f.Envoy.adminSocket(); socket != "" {
		return "sudo curl -sS -m 5 --unix-socket " + word(socket, "SOCKET") + " " +
			word("http://envoy"+path, "URL")
	}
	return "curl -sS -m 5 " + word("http://"+cmp.Or(f.Envoy.Admin, "127.0.0.1:15000")+path, "URL")
}

// adminSocket is the path of the admin interface, "" where that is a port.
func (e Envoy) adminSocket() string {
	path, ok := strings.CutPrefix(e.Admin, "unix:")
	if !ok {
		return ""
	}
	return strings.TrimPrefix(path, "//")
}

// listSocket shows whose the admin socket and its folder are.
func (f Facts) listSocket() string {
	path := f.Envoy.adminSocket()
	return "sudo ls -ld -- " + word(filepath.Dir(path), "FOLDER") + " " + word(path, "SOCKET")
}

// askMetadata is a question to the metadata server.
func askMetadata(flags, path string) string {
	return "curl -sS " + flags + "-H 'Metadata-Flavor: Google' " +
		"http://metadata.google.internal/computeMetadata/v1/" + path
}

const (
	readAttribute = "instance/attributes/gce-service-proxy"
	statusEnvoy   = "systemctl status service-proxy-envoy"
	restartEnvoy  = "sudo systemctl restart service-proxy-envoy"
	showEnvoys    = "ps -o pid,user,args -C envoy"
	editDefaults  = `sudo "${EDITOR:-vi}" /etc/default/service-proxy-agent`
	restartAgent  = "sudo systemctl restart service-proxy-agent"
)

const defaultLog = "/var/log/envoy/envoy.err.log"

// envoyLog is where Envoy's log is. An older recording does not say: the default is as good there.
func (f Facts) envoyLog() string { return name(cmp.Or(f.EnvoyLog, defaultLog)) }

// logFile and logFolder are the same for a command.
func (f Facts) logFile() string { return word(cmp.Or(f.EnvoyLog, defaultLog), "FILE") }
func (f Facts) logFolder() string {
	return word(filepath.Dir(cmp.Or(f.EnvoyLog, defaultLog)), "FOLDER")
}

func (f Facts) tailLog() string { return "sudo tail -n 50 " + f.logFile() }

// grepLog is the last lines of Envoy's log in which these words are. flags are of grep.
func (f Facts) grepLog(flags, words string) string {
	return "sudo grep " + flags + words + " " + f.logFile() + " | tail -n 5"
}

func (f Facts) grepStream() string { return f.grepLog("", "'gRPC config stream'") }

// setAttribute writes another attribute, after a look at what it would change.
func (f Facts) setAttribute() []string {
	return []string{askMetadata("", readAttribute) + " > FILE", editFile,
		"sudo service-proxy-agent diff --config FILE",
		f.instance("add-metadata", "--metadata-from-file=gce-service-proxy=FILE")}
}

const editFile = `"${EDITOR:-vi}" FILE`

// listens shows who listens on a port.
func listens(port uint16) string {
	return "sudo ss -ltunp 'sport = :" + strconv.Itoa(int(port)) + "'"
}

// tables is iptables, or its twin for IPv6.
func tables(family interface{ String() string }) string {
	if family.String() == "IPv6" {
		return "ip6tables"
	}
	return "iptables"
}

// hostOf is the host of "HOST:PORT", or of what has no port.
func hostOf(target string) string {
	if host, _, err := net.SplitHostPort(target); err == nil {
		return host
	}
	return target
}

var (
	pidRE     = regexp.MustCompile(`\(pid (\d+)\)`)
	portRE    = regexp.MustCompile(`^listen tcp \S*:(\d{1,5}): `)
	extension = regexp.MustCompile(
		"(?:match|target) [`'](\\w+)'|[Ee]xtension (\\w+) revision")
)

// showProcess shows the program that is named "NAME (pid N)".
func showProcess(by string) []string {
	if m := pidRE.FindStringSubmatch(by); m != nil {
		return []string{"ps -fp " + m[1]}
	}
	return nil
}

// showListener shows who listens on the port of "listen tcp ADDRESS:PORT: …", else the agent's
// settings.
func showListener(err error) []string {
	if m := portRE.FindStringSubmatch(err.Error()); m != nil {
		return []string{"sudo ss -ltnp 'sport = :" + m[1] + "'"}
	}
	return []string{editDefaults}
}

// rebootForModules looks why no module can be loaded, and ends that.
var rebootForModules = []string{"sysctl kernel.modules_disabled", "ls -d /lib/modules/$(uname -r)",
	"sudo reboot"}

// loadExtension loads the kernel's modules for what iptables or the kernel does not know. Where
// iptables-nft has no nft_compat it says of each extension, or of the first, that it is missing: so
// that one is loaded, too.
func loadExtension(stderr string) []string {
	var modules []string
	for _, m := range extension.FindAllStringSubmatch(stderr, -1) {
		if module := "xt_" + cmp.Or(m[1], m[2]); !slices.Contains(modules, module) {
			modules = append(modules, module)
		}
	}
	switch {
	case len(modules) > 0:
	case strings.Contains(stderr, `unknown option "--to-ports"`): // the target's, which is not there
		modules = []string{"xt_REDIRECT"}
	case strings.Contains(stderr, "CHAIN_ADD failed (No such file or directory)"):
		return []string{"sudo modprobe nft_chain_nat"} // the kernel has no such type of chain
	default:
		return nil
	}
	if !strings.Contains(stderr, "(legacy)") {
		modules = append([]string{"nft_compat"}, modules...)
	}
	return []string{"sudo modprobe -a " + strings.Join(modules, " ")}
}

// withoutNFTables is what iptables-nft says where the kernel has no nf_tables.
var withoutNFTables = regexp.MustCompile("initialize nft|rule set generation id")

// tableModule is the kernel's module without which a family has no table nat.
func tableModule(fam Family) string {
	switch {
	case fam.Unusable != nil && withoutNFTables.MatchString(fam.Unusable.Error()):
		return "nf_tables" // which loads the rest by itself
	case fam.Family == iptables.IPv6:
		return "ip6table_nat"
	}
	return "iptable_nat"
}

// routeTo asks the kernel for its way to an address.
func routeTo(addr netip.Addr) string {
	if addr.Is6() {
		return "ip -6 route get " + addr.WithZone("").String()
	}
	return "ip route get " + addr.String()
}
