package gather

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/bundle"
	"github.com/service-proxy-agent/service-proxy-agent/internal/progress"
	"github.com/service-proxy-agent/service-proxy-agent/test/schema"
)

// A VM made of files, programs that are scripts, an Envoy and a metadata server. In every answer
// there are secrets, as s3cr3t, and beside them the word marker: a mask that takes all, or a source
// that was not asked, is no proof.

// answers are those of programs, by their command lines up to the first that begins so.
var answers = map[string]string{
	"iptables-save -c":         "*nat\n-A OUTPUT -m comment --comment \"marker token=s3cr3t\" -j X\n",
	"ip6tables-save -c":        "*nat\n-A OUTPUT -m comment --comment \"marker https://h/?k=s3cr3t\" -j X\n",
	"iptables-legacy-save -c":  "*filter\n-A X -m comment --comment \"marker bearer s3cr3t\"\n",
	"ip6tables-legacy-save -c": "*filter\n-A X -m comment --comment \"marker ya29.s3cr3t\"\n",
	"nft list ruleset":         "table ip marker {\n comment \"password=s3cr3t\"\n}\n",
	"journalctl": "2026 vm x[1]: marker Authorization: Basic s3cr3t\n2026 vm x[1]: https://u:s3cr3t@h/a?X-Goog-Signature=s3cr3t: 403\n" +
		"2026 vm x[1]: cookie: a=s3cr3t; b=s3cr3t\n2026 vm x[1]: x-api-key: s3cr3t\n2026 vm x[1]: --client-secret=s3cr3t eyJs3cr3t.x.y\n",
	"systemctl cat": "# /etc/systemd/system/service-proxy-envoy.service.d/marker.conf\n[Service]\nEnvironment=A=s3cr3t \"B=s3cr3t\" \\\n  C=s3cr3t\n" +
		"ExecStart=/usr/bin/envoy --x s3cr3t\nSetCredential=a:s3cr3t\n# s3cr3t\nX-Mine=s3cr3t\n",
	// Only where they are asked for.
	"systemctl show": "Id=marker\n${ASKED_FOR_Environment:+Environment=A=s3cr3t}\n${ASKED_FOR_ExecStart:+ExecStart=x s3cr3t}\n",
	"ip":             "1: marker: state UP token=s3cr3t\n",
	"ss":             "LISTEN marker:80 users:((\"envoy\",pid=1))\n",
	"ps":             "1 marker\n${ASKED_FOR_args:+envoy --x s3cr3t}\n",
	"uname -a":       "Linux marker\n", "iptables --version": "iptables v1.8.9\n", "ip6tables --version": "v1.8.9\n",
	"nft --version": "v1\n", "systemctl --version": "systemd 252\n",
}

// script is a program that has one of the answers.
func script(name string) string {
	var b strings.Builder
	b.WriteString("#!/bin/sh\nfor n in Environment ExecStart args cmd; do\n" +
		"case \"$*\" in *\"$n,\"*|*\",$n\"*) eval ASKED_FOR_$n=1;; esac; done\n" +
		"[ \"$LC_ALL\" = C ] || exit 9\n[ -z \"$PLANTED\" ] || echo s3cr3t\ncase \"NAME $*\" in\n")
	for command, text := range answers {
		if command == name || strings.HasPrefix(command, name+" ") {
			fmt.Fprintf(&b, "%q*) cat <<END\n%sEND\n;;\n", command, text)
		}
	}
	return strings.Replace(b.String(), "NAME", name, 1) + "*) exit 3;; esac\n"
}

func file(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

// vm makes the VM. What goes wrong with it is up to the test.
func vm(t *testing.T) Settings {
	t.Helper()
	root := t.TempDir()
	s := Settings{
		Root: root, Path: filepath.Join(root, "bin") + ":/usr/bin:/bin",
		EnvoyLog: "/var/log/envoy/envoy.err.log", StateDir: progress.StateDir,
		Environment: "/etc/default/service-proxy-agent", Known: []string{"SERVICE_PROXY_AGENT_CONFIG", "OURS"},
	}
	t.Setenv("PLANTED", "an environment that a program must not see")
	for command := range answers {
		name, _, _ := strings.Cut(command, " ")
		file(t, filepath.Join(root, "bin", name), script(name), 0o755)
	}
	file(t, root+"/usr/local/bin/envoy", "#!/bin/sh\necho envoy marker\n", 0o755)
	file(t, root+"/proc/net/ip_tables_names", "filter\n", 0o600)
	file(t, root+"/proc/net/ip6_tables_names", "filter\n", 0o600)
	file(t, root+"/proc/net/stat/nf_conntrack", "entries marker\n00000001 5\n", 0o600)
	file(t, root+"/proc/sys/net/core/somaxconn", "4096\n", 0o600)
	file(t, root+"/etc/os-release", "NAME=marker\n", 0o600)
	file(t, root+"/etc/resolv.conf", "# marker password=s3cr3t\nnameserver 10.0.0.1\n", 0o600)
	file(t, root+s.Environment, "OURS='marker https://u:s3cr3t@h/?k=s3cr3t'\nMY_VARIABLE=s3cr3t\n# s3cr3t\n"+
		"HTTPS_PROXY=http://u:s3cr3t@p:1\n", 0o600)
	file(t, root+s.StateDir+"/bootstrap.json", `{"status":"FAILED","envoy":{"node":"marker"},`+
		`"failure":"download: https://h/e.tgz?X-Goog-Signature=s3cr3t: 403, Bearer s3cr3t",`+
		`"story":[{"text":"authorization: Basic s3cr3t"}]}`, 0o600)
	file(t, root+s.EnvoyLog, "s3cr3t\"\n[2026-11-29 04:00:00.1][1][info][x] marker token=s3cr3t\n"+
		"[2026-11-29 04:00:00.1][1][debug][http] [a.cc:1] headers:\n':path', '/s3cr3t'\n'a', 's3cr3t'\n"+
		"[2026-11-29 04:00:00.1][1][warning][config] rejected: goo.gle/debugonly\ninline_code: \"s3cr3t\"\n"+
		"[2026-11-29 04:00:00.1][1][warning][config] script load error: [string \"s3cr3t\"]:1: near 's3cr3t'\n", 0o600)
	config, err := os.ReadFile("../bundle/testdata/config.json")
	if err != nil {
		t.Fatal(err)
	}
	file(t, root+"/etc/service-proxy-agent/envoy.json", `{"node":{"id":"marker","metadata":{"k":"s3cr3t"}}}`, 0o600)
	envoy := http.NewServeMux()
	for path, text := range map[string]string{
		"/server_info": `{"version":"marker/1.40.0/x","state":"LIVE","command_line_options":{"config_yaml":"s3cr3t",` +
			`"config_path":"/x","unknown":"s3cr3t"},"node":{"metadata":{"k":"s3cr3t"}}}`,
		"/listeners":   "marker::127.0.0.1:1\na?k=s3cr3t::127.0.0.1:2\n",
		"/stats":       "server.marker: 1\ncluster.https://h/x?k=s3cr3t.y: 5\ncluster.a?s3cr3t: 5\n",
		"/clusters":    "marker::10.0.0.1:80::cx_active::1\na?s3cr3t::added_via_api::true\nhttps://u:s3cr3t@h/?s3cr3t::x::1\n",
		"/config_dump": strings.Replace(string(config), `"cluster":"c"`, `"cluster":"marker"`, 1),
	} {
		envoy.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, text) })
	}
	s.EnvoyAdmin = served(t, envoy)
	metadata := http.NewServeMux()
	metadata.HandleFunc("/computeMetadata/v1/instance/attributes/gce-service-proxy",
		func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Metadata-Flavor", "Google")
			fmt.Fprint(w, `{"labels":{"app":"s3cr3t"},"proxy-spec":{"network":"marker",`+
				`"primary-source":"https://h/envoy.tgz?X-Goog-Signature=s3cr3t"},"new":"s3cr3t"}`)
		})
	metadata.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		t.Errorf("the metadata server is asked for %s", r.URL) // for a token, say
	})
	t.Setenv("GCE_METADATA_HOST", served(t, metadata))
	daemon := http.NewServeMux()
	daemon.HandleFunc("/metrics", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "x{cluster=\"marker\"} 1\nx{cluster=\"a?s3cr3t\"} 1\nx{why=\"Bearer s3cr3t\"} 1\n")
	})
	s.Listen = served(t, daemon)
	return s
}

func served(t *testing.T, h http.Handler) (addr string) {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return server.Listener.Addr().String()
}

// bundled is a bundle of the VM, with what its manifest says.
func bundled(t *testing.T, s Settings, change func(*Source)) (
	m bundle.Manifest, files map[string]string) {
	t.Helper()
	sources := Sources(s, "")
	for i := range sources {
		if change != nil {
			change(&sources[i])
		}
	}
	m = bundle.Manifest{Version: "1.2.3", Time: time.Now(), Host: "vm-1", Kernel: "6.1"}
	m.Files, m.Gaps = Run(t.Context(), sources)
	path := filepath.Join(t.TempDir(), "b.tgz")
	var b bytes.Buffer
	if err := bundle.Write(&b, "folder", m); err != nil {
		t.Fatal(err)
	}
	file(t, path, b.String(), 0o600)
	files = map[string]string{}
	manifest, err := bundle.Read(path, bundle.ManifestFile)
	if err != nil {
		t.Fatal(err)
	}
	schema.Valid(t, "bundle", manifest)
	m = bundle.Manifest{}
	if err := json.Unmarshal(manifest, &m); err != nil {
		t.Fatal(err)
	}
	files[bundle.ManifestFile] = string(manifest)
	for _, f := range m.Files {
		data, err := bundle.Read(path, f.Name)
		if err != nil || len(data) != f.Bytes {
			t.Errorf("%s: %d bytes of %d, %v", f.Name, len(data), f.Bytes, err)
		}
		files[f.Name] = string(data)
	}
	return m, files
}

// TestNoSecret: a VM with secrets planted in every source makes a bundle without any.
func TestNoSecret(t *testing.T) {
	s := vm(t)
	m, files := bundled(t, s, nil)
	for _, g := range m.Gaps {
		t.Errorf("a gap: %s: %s", g.Name, g.Why)
	}
	for _, source := range Sources(s, "") {
		text, there := files[source.Name]
		if !there {
			t.Errorf("%s is not in it", source.Name)
		}
		if source.Name != "network/sysctls.txt" && !strings.Contains(text, "marker") {
			t.Errorf("%s has nothing of its source:\n%s", source.Name, text)
		}
	}
	for name, text := range files {
		for line := range strings.Lines(text) {
			if strings.Contains(line, "s3cr3t") {
				t.Errorf("%s has a secret: %s", name, line)
			}
		}
	}
	// Without the masks they would all be there: but where a source does not ask for any.
	_, raw := bundled(t, s, func(s *Source) {
		s.Mask.Apply = func(in []byte) ([]byte, error) { return in, nil }
	})
	for _, source := range Sources(s, "") {
		has := strings.Contains(raw[source.Name], "s3cr3t")
		none := slices.Contains([]string{"units/show.txt", "network/sysctls.txt", "network/conntrack.txt",
			"network/sockets.txt", "processes.txt", "versions.txt", "versions-os.txt"}, source.Name)
		if has == none {
			t.Errorf("%s without its mask: a secret: %v, want %v", source.Name, has, !none)
		}
	}
	if !strings.Contains(files["network/sysctls.txt"], "net.core.somaxconn = 4096") {
		t.Errorf("sysctls: %s", files["network/sysctls.txt"])
	}
}

// TestGaps: what cannot be had is named with its reason, and nothing else is missing.
func TestGaps(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // takes connections, and does not answer
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	replace := func(program, text string) func(*testing.T, *Settings) {
		return func(t *testing.T, s *Settings) {
			path := filepath.Join(s.Root, "bin", program)
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if text != "" {
				file(t, path, "#!/bin/sh\n"+text, 0o755)
			}
		}
	}
	soon := func(name string) func(*Source) {
		return func(s *Source) {
			if s.Name == name {
				s.Limit = 100 * time.Millisecond
			}
		}
	}
	for _, tt := range []struct {
		name   string
		change func(*testing.T, *Settings)
		source func(*Source)
		gaps   map[string]string // a part of the reason, by name
	}{
		{"no journalctl", func(t *testing.T, s *Settings) {
			replace("journalctl", "")(t, s)
			s.Path = filepath.Join(s.Root, "bin")
			for _, program := range []string{"sh", "cat"} { // for the scripts
				if err := os.Symlink("/bin/"+program, filepath.Join(s.Path, program)); err != nil {
					t.Fatal(err)
				}
			}
		}, nil, map[string]string{
			"logs/agent.txt": "no program journalctl", "logs/envoy.txt": "no program journalctl",
			"logs/bootstrap.txt": "no program journalctl", "logs/kernel.txt": "no program journalctl"}},
		{"a program that fails", replace("iptables-save", "echo 'x token=s3cr3t' >&2; exit 4"), nil,
			map[string]string{"rules/iptables-save.txt": "iptables-save: exit status 4: x token=[...]"}},
		{"a program that hangs", replace("iptables-save", "echo '*nat'; exec sleep 1000"),
			soon("rules/iptables-save.txt"), map[string]string{"rules/iptables-save.txt": "no answer in time"}},
		{"one of several", replace("ss", "exit 1"), nil, map[string]string{
			"ss -s": "exit status 1", "ss -lntupH": "exit status 1", "ss -lxH": "exit status 1"}},
		{"Envoy hangs", func(t *testing.T, s *Settings) { s.EnvoyAdmin = silent.Addr().String() },
			soon("envoy/server_info.json"), map[string]string{"envoy/server_info.json": "no answer",
				"envoy/listeners.txt": "not asked", "envoy/stats.txt": "not asked",
				"envoy/clusters.txt": "not asked", "envoy/config_dump.json": "not asked"}},
		{"no Envoy, no daemon", func(t *testing.T, s *Settings) {
			s.EnvoyAdmin, s.Listen = "unix:///nowhere", "127.0.0.1:1"
		}, nil, map[string]string{"envoy/server_info.json": "nothing listens", "envoy/listeners.txt": "not asked",
			"envoy/stats.txt": "not asked", "envoy/clusters.txt": "not asked",
			"envoy/config_dump.json": "not asked", "metrics.prom": "nothing listens on 127.0.0.1:1"}},
		{"the metadata server hangs", func(t *testing.T, s *Settings) {
			t.Setenv("GCE_METADATA_HOST", silent.Addr().String())
		}, soon("settings/attribute.json"), map[string]string{"settings/attribute.json": "no answer"}},
		{"a file that is a folder", func(t *testing.T, s *Settings) {
			s.Environment = "/etc"
		}, nil, map[string]string{"settings/environment.txt": "not a regular file"}},
		{"a link in place of Envoy's log", func(t *testing.T, s *Settings) {
			if err := os.Rename(s.Root+s.EnvoyLog, s.Root+"/secret"); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(s.Root+"/secret", s.Root+s.EnvoyLog); err != nil {
				t.Fatal(err)
			}
		}, nil, map[string]string{"envoy/log.txt": "symbolic links"}},
		{"no legacy tables", func(t *testing.T, s *Settings) {
			file(t, s.Root+"/proc/net/ip_tables_names", "", 0o600)
			if err := os.Remove(s.Root + "/proc/net/ip6_tables_names"); err != nil {
				t.Fatal(err)
			}
			replace("iptables-legacy-save", "echo asked >"+s.Root+"/asked")(t, s)
			replace("ip6tables-legacy-save", "echo asked >"+s.Root+"/asked")(t, s)
			t.Cleanup(func() {
				if _, err := os.Stat(s.Root + "/asked"); err == nil {
					t.Error("a legacy table that is not there was asked for, which makes it")
				}
			})
		}, nil, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := vm(t)
			tt.change(t, &s)
			m, files := bundled(t, s, tt.source)
			for _, g := range m.Gaps {
				want, named := tt.gaps[g.Name]
				if !named || !strings.Contains(g.Why, want) {
					t.Errorf("gap %s: %s, want %q", g.Name, g.Why, want)
				}
				delete(tt.gaps, g.Name)
			}
			if len(tt.gaps) > 0 {
				t.Errorf("no gap is named for %v", tt.gaps)
			}
			if strings.Contains(files[bundle.ManifestFile], "s3cr3t") {
				t.Errorf("a secret in %s", files[bundle.ManifestFile])
			}
		})
	}
}

// A program's answer is bounded, and it is ended once nothing more of it is kept.
func TestBoundedCommand(t *testing.T) {
	dir := t.TempDir()
	file(t, filepath.Join(dir, "endless"), "#!/bin/sh\nwhile :; do echo 0123456789; done\n", 0o755)
	answer, err := programs{"", dir + ":/bin"}.run(context.Background(), 1000, false, "endless")
	if err != nil || len(answer.Data) > 1000 || len(answer.Data) < 900 || answer.Cut == "" {
		t.Errorf("%d bytes, %q, %v", len(answer.Data), answer.Cut, err)
	}
}
