package gather

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/service-proxy-agent/service-proxy-agent/envoyadmin"
	"github.com/service-proxy-agent/service-proxy-agent/internal/attribute"
	"github.com/service-proxy-agent/service-proxy-agent/internal/bundle"
	"github.com/service-proxy-agent/service-proxy-agent/internal/layout"
	"github.com/service-proxy-agent/service-proxy-agent/internal/metadata"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
	"github.com/service-proxy-agent/service-proxy-agent/systemd"
)

// Settings say where to look. They are the daemon's.
type Settings struct {
	EnvoyAdmin, EnvoyLog  string
	Config                string // the attribute's file; "": the metadata server; "none": no attribute
	StateDir              string
	Listen, MetricsListen string
	Environment           string   // the daemon's file of settings
	Known                 []string // the variables in it that are the daemon's

	// Root and Path replace "/" and $PATH in tests.
	Root, Path string
}

const (
	kilo = 1 << 10
	mega = 1 << 20
)

// The masks. docs/bundle.md says what each takes out.
var (
	lines   = Mask{"secrets", bundle.Lines}
	names   = Mask{"names", bundle.Names}
	quoting = Mask{"quotations", bundle.Quoting}
	config  = Mask{"config", bundle.Config}
	// Told and Lines are for the files that the caller adds.
	Told  = Mask{"secrets", bundle.Told}
	Lines = lines
	HTML  = Mask{"secrets", bundle.HTML}
)

// Sources are the files of a bundle but for those that are made of a look: of these the one that
// looks, which asks Envoy too, is waited for.
func Sources(s Settings, look string) []Source {
	path := s.Path
	if path == "" {
		path = os.Getenv("PATH") + sbin
	}
	p := programs{s.Root, path}
	var all []Source
	all = append(all, s.ofEnvoy(look)...)
	all = append(all, s.files()...)
	return append(all, s.commands(p)...)
}

// commands are the files that a program writes.
func (s Settings) commands(p programs) []Source {
	var texts [][]byte
	for _, f := range systemd.Files() {
		texts = append(texts, f.Text)
	}
	unitNames := strings.Join([]string{systemd.AgentUnit, systemd.InterceptionUnit, systemd.EnvoyUnit,
		systemd.BootstrapUnit, systemd.BootstrapPath, systemd.ReadyTarget, systemd.ReadyUnit,
		systemd.ReadyPath, systemd.RotateTimer, systemd.RotateUnit}, " ")
	units := Mask{"units", bundle.Units(texts)}
	journal := "journalctl --no-pager --utc -o short-iso-precise -n 4000 "
	sources := []Source{
		one("rules/iptables-save.txt", "iptables-save -c", 8*mega, p.whole, lines),
		one("rules/ip6tables-save.txt", "ip6tables-save -c", 8*mega, p.whole, lines),
		{"rules/iptables-legacy-save.txt", "iptables-legacy-save -c", "", short, 8 * mega,
			p.legacy(s.Root, 8*mega, false), lines},
		{"rules/ip6tables-legacy-save.txt", "ip6tables-legacy-save -c", "", short, 8 * mega,
			p.legacy(s.Root, 8*mega, true), lines},
		one("rules/nft.txt", "nft list ruleset", 8*mega, p.whole, lines),
		one("logs/agent.txt", journal+"-u "+systemd.AgentUnit, 2*mega, p.end, lines),
		one("logs/envoy.txt", journal+"-u "+systemd.EnvoyUnit, 2*mega, p.end, quoting),
		one("logs/bootstrap.txt", journal+"-u "+systemd.BootstrapUnit, 2*mega, p.end, quoting),
		one("logs/kernel.txt", journal+"-k", mega, p.end, quoting),
		one("units/cat.txt", "systemctl cat --no-pager -- "+unitNames, mega, p.whole, units),
		one("units/show.txt", "systemctl show --no-pager --property="+shown+" -- "+unitNames, mega,
			p.whole, lines),
		several("network/addresses.txt", mega, p, "ip -s address"),
		several("network/routes.txt", 4*mega, p, "ip rule", "ip -6 rule", "ip route show table all",
			"ip -6 route show table all"),
		several("network/sockets.txt", 4*mega, p, "ss -s", "ss -lntupH", "ss -lxH"),
		several("processes.txt", mega, p,
			"ps -e -o pid,ppid,user:20,lstart,etime,time,rss,nlwp,stat,comm --sort=-rss"),
		several("versions.txt", 64*kilo, p, "uname -a", "iptables --version", "ip6tables --version",
			"nft --version", "systemctl --version", layout.Envoy+" --version"),
	}
	return sources
}

const short = 8 * time.Second

// one is a file of one command's answer.
func one(name, command string, most int,
	how func(int, string) func(context.Context) (Answer, error), mask Mask) Source {
	return Source{Name: name, From: command, Limit: short, Most: most + kilo,
		Get: how(most, command), Mask: mask}
}

// several is a file of several commands' answers.
func several(name string, most int, p programs, commands ...string) Source {
	return Source{Name: name, From: strings.Join(commands, "; "), Limit: short, Most: 4 * most,
		Get: p.each(most, commands...), Mask: lines}
}

// shown are the properties of units: none holds a command line or a variable.
const shown = "Id,Description,LoadState,ActiveState,SubState,Result,UnitFileState,FragmentPath," +
	"DropInPaths,NeedDaemonReload,MainPID,ExecMainStartTimestamp,ExecMainExitTimestamp,ExecMainCode," +
	"ExecMainStatus,NRestarts,MemoryCurrent,MemoryPeak,MemoryMax,CPUUsageNSec,TasksCurrent," +
	"LimitNOFILE,ActiveEnterTimestamp,InactiveEnterTimestamp,StateChangeTimestamp,ConditionResult," +
	"ConditionTimestamp,AssertResult,InvocationID,User,Group,Restart,TriggeredBy,Job"

// files are the files that are read, or asked of a server of this VM.
func (s Settings) files() []Source {
	environment := Mask{"environment", bundle.Environment(s.Known)}
	masked := Mask{"attribute", bundle.Attribute}
	return []Source{
		s.file("envoy/bootstrap.json", "/etc/service-proxy-agent/envoy.json", 4*mega, config),
		{"envoy/log.txt", "the end of " + s.EnvoyLog, "", short, 3 * mega, s.envoyLog,
			Mask{"quotations", bundle.EnvoyLog}},
		s.file("settings/environment.txt", s.Environment, mega, environment),
		{"settings/attribute.json", "metadata attribute " + attribute.Name, "", short, mega,
			s.attribute, masked},
		s.file("bootstrap.json", s.StateDir+"/"+progress.StateFile, mega, Told),
		s.file("network/resolv.conf", "/etc/resolv.conf", 64*kilo, lines),
		s.file("versions-os.txt", "/etc/os-release", 64*kilo, lines),
		{"network/sysctls.txt", "/proc/sys", "", short, 64 * kilo, s.sysctls, lines},
		{"network/conntrack.txt", "/proc/net/stat/nf_conntrack", "", short, 64 * kilo,
			s.read("/proc/net/stat/nf_conntrack", 64*kilo), lines},
		{"metrics.prom", "GET /metrics of the daemon", "", short, 8 * mega, s.metrics, names},
	}
}

// file is a file of this VM. One that is not there is no gap.
func (s Settings) file(name, path string, most int, mask Mask) Source {
	return Source{Name: name, From: path, Limit: short, Most: 2 * most, Get: s.read(path, int64(most)),
		Mask: mask}
}

func (s Settings) read(path string, most int64) func(context.Context) (Answer, error) {
	return func(context.Context) (Answer, error) {
		open := untrusted.OpenRegular
		if strings.HasPrefix(path, s.StateDir+"/") {
			open = untrusted.Open // the folder is the daemon's user's
		}
		f, err := open(s.Root + path)
		if errors.Is(err, fs.ErrNotExist) {
			return Answer{}, errAbsent
		}
		if err != nil {
			return Answer{}, err
		}
		defer f.Close()
		data, err := io.ReadAll(io.LimitReader(f, most+1))
		if int64(len(data)) > most {
			data = data[:bytes.LastIndexByte(data[:most], '\n')+1]
			return Answer{Data: data, Cut: fmt.Sprintf("its end: more than %d bytes", most)}, nil
		}
		return Answer{Data: data}, err
	}
}

// envoyLog is the log's end. The folder is that of Envoy's user, who may put a link there.
func (s Settings) envoyLog(context.Context) (Answer, error) {
	if s.EnvoyLog == "" {
		return Answer{}, errors.New("--envoy-log is empty")
	}
	f, err := untrusted.Open(s.Root + s.EnvoyLog)
	if err != nil {
		return Answer{}, err
	}
	defer f.Close()
	const most = 2 * mega
	data, err := envoyadmin.Tail(f, most)
	answer := Answer{Data: data}
	if info, e := f.Stat(); e == nil && info.Size() > most {
		answer.Cut = fmt.Sprintf("its beginning: it has %d bytes", info.Size())
	}
	return answer, err
}

func (s Settings) attribute(ctx context.Context) (Answer, error) {
	switch s.Config {
	case "":
	case "none":
		return Answer{}, errAbsent
	default:
		return s.read(s.Config, attribute.MaxSize)(ctx)
	}
	text, err := metadata.Read(ctx, "instance/attributes/"+attribute.Name)
	var of *metadata.Error
	if errors.As(err, &of) && of.Code == http.StatusNotFound {
		return Answer{}, errAbsent
	}
	return Answer{Data: text}, err
}

// sysctls are those that decide what becomes of a connection.
func (s Settings) sysctls(context.Context) (Answer, error) {
	var out bytes.Buffer
	var all Answer
	for _, name := range strings.Fields(`net/ipv4/ip_forward net/ipv4/ip_local_port_range
		net/ipv4/ip_local_reserved_ports net/ipv4/conf/all/rp_filter net/ipv4/conf/all/route_localnet
		net/ipv4/conf/default/rp_filter net/ipv4/tcp_tw_reuse net/ipv4/tcp_max_syn_backlog
		net/ipv4/tcp_syncookies net/ipv4/ip_nonlocal_bind net/ipv4/ip_unprivileged_port_start
		net/ipv6/conf/all/disable_ipv6 net/ipv6/conf/all/forwarding net/core/somaxconn
		net/netfilter/nf_conntrack_count net/netfilter/nf_conntrack_max
		net/netfilter/nf_conntrack_buckets net/netfilter/nf_conntrack_tcp_loose
		net/netfilter/nf_conntrack_tcp_be_liberal net/netfilter/nf_conntrack_tcp_timeout_established
		net/bridge/bridge-nf-call-iptables fs/file-nr fs/file-max vm/overcommit_memory
		kernel/random/boot_id`) {
		text, err := os.ReadFile(s.Root + "/proc/sys/" + name)
		switch {
		case err == nil:
			fmt.Fprintf(&out, "%s = %s\n", strings.ReplaceAll(name, "/", "."),
				strings.Join(strings.Fields(string(text)), " "))
		case !errors.Is(err, fs.ErrNotExist): // its module may not be loaded
			all.Gaps = append(all.Gaps, bundle.Gap{Name: "sysctl " + name, Why: whyNot(err)})
		}
	}
	all.Data = out.Bytes()
	return all, nil
}

// metrics asks the daemon as Prometheus does, but not one that wants to know who asks.
func (s Settings) metrics(ctx context.Context) (Answer, error) {
	listen := s.MetricsListen
	if listen == "" {
		listen = s.Listen
	}
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return Answer{}, errors.New("the daemon has no --listen")
	}
	if host == "" || host == "0.0.0.0" || host == "::" {
		host = "127.0.0.1"
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet,
		"http://"+net.JoinHostPort(host, port)+"/metrics", nil)
	if err != nil {
		return Answer{}, err
	}
	// No proxy, and no other place than this one.
	client := http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true, DisableCompression: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	response, err := client.Do(request)
	if errors.Is(err, unix.ECONNREFUSED) {
		return Answer{}, fmt.Errorf("nothing listens on %s", listen)
	}
	if err != nil {
		return Answer{}, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return Answer{}, fmt.Errorf("%s answers %d", listen, response.StatusCode)
	}
	out := &kept{most: 8 * mega}
	_, err = io.Copy(out, io.LimitReader(response.Body, 8*mega+1))
	return out.answer(), err
}
