package lab

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Container is what an Envoy has of its own when it runs from an image: root, mounts, processes,
// IPC, and what is named here. Its admin interface is /run/envoy/admin.sock, and it shares that
// folder and /var/log/envoy with the VM, unless told otherwise. EnvoyOptions.Args are all of its
// arguments: its bootstrap is /etc/envoy/envoy.json, its log should be /var/log/envoy/envoy.log.
type Container struct {
	// Network is that of a bridge; nil: the VM's, as by --network host.
	Network *Namespace
	// FirstUID is the VM's number of its uid 0, and 65,535 more follow; 0: no user namespace.
	FirstUID uint32
	// SocketMode is that of the admin socket; 0: 0660.
	SocketMode uint32
	// LogApart and SocketApart: the folder is the container's alone.
	LogApart, SocketApart bool
}

// Where an Envoy in a container has them.
const (
	containerRun    = "/run/envoy"
	containerSocket = containerRun + "/admin.sock"
	containerLogs   = "/var/log/envoy"
	containerConfig = "/etc/envoy/envoy.json"
	containerEnvoy  = "/opt/envoy"
)

// enter makes the container's root ($1) of a tmpfs and of what is bound into it (FROM TO, a line
// each, $2), and becomes Envoy (the rest) as uid and gid $3. The programs of this machine stand for
// those of an image.
const enter = `
mount --make-rprivate /
mount -t tmpfs -o mode=755 container "$1"
cd "$1"
mkdir -p proc dev etc usr tmp opt run/envoy var/log/envoy
for link in bin sbin lib lib64; do ln -s usr/$link $link; done
mount -t proc proc proc
printf '%s\n' "$2" | while read -r from to; do
	if [ -d "$from" ]; then mkdir -p ".$to"; else mkdir -p ".${to%/*}"; : >".$to"; fi
	mount --bind "$from" ".$to"
done
chown "$3:$3" run/envoy var/log/envoy
root=$1 id=$3; shift 3
exec chroot "$root" setpriv --reuid "$id" --regid "$id" --clear-groups --bounding-set=-all \
	--no-new-privs --pdeathsig KILL -- "$@"
`

// contain has e run in a container. The folders that are shared belong to Envoy's user.
func (e *Envoy) contain(opts EnvoyOptions) error {
	c := opts.Container
	inside := opts.UID
	e.UID = c.FirstUID + inside
	run, logs := filepath.Join(e.lab.Dir, "container-run"), filepath.Join(e.lab.Dir, "container-log")
	root := filepath.Join(e.lab.Dir, "container-root")
	for _, dir := range []string{run, logs, root} {
		if err := os.Mkdir(dir, 0o750); err != nil {
			return fmt.Errorf("make a container: %w", err)
		}
		if err := os.Chown(dir, int(e.UID), int(e.UID)); err != nil {
			return fmt.Errorf("make a container: %w", err)
		}
	}
	e.LogPath, e.AdminSocket = filepath.Join(logs, "envoy.log"), filepath.Join(run, "admin.sock")
	binds := [][2]string{{"/usr", "/usr"}, {"/dev/null", "/dev/null"},
		{"/dev/urandom", "/dev/urandom"}, {opts.Binary, containerEnvoy}, {e.config, containerConfig}}
	if !c.SocketApart {
		binds = append(binds, [2]string{run, containerRun})
	}
	if !c.LogApart {
		binds = append(binds, [2]string{logs, containerLogs})
	}
	var lines strings.Builder
	for _, b := range binds {
		fmt.Fprintln(&lines, b[0], b[1])
	}
	e.argv = append([]string{"-ec", enter, "container", root, strings.TrimSpace(lines.String()),
		strconv.FormatUint(uint64(inside), 10), containerEnvoy, "--concurrency", "1"}, opts.Args...)
	e.admin = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", e.AdminSocket)
		},
	}}
	e.container = c
	return nil
}

// startContained starts the container's first process, which becomes Envoy: its pid here is
// Envoy's. The namespaces are made by clone(2), since only what is in the VM's user namespace may
// enter its network.
func (e *Envoy) startContained() (*exec.Cmd, error) {
	said, err := os.OpenFile(filepath.Join(e.lab.Dir, "container.out"),
		os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start a container: %w", err)
	}
	defer said.Close()
	cmd := exec.Command("sh", e.argv...)
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = e.lab.Env(), "/", said, said
	attr := &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL,
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC |
			syscall.CLONE_NEWUTS}
	if first := int(e.container.FirstUID); first != 0 {
		attr.Cloneflags |= syscall.CLONE_NEWUSER
		ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: first, Size: 1 << 16}}
		attr.UidMappings, attr.GidMappings, attr.GidMappingsEnableSetgroups = ids, ids, true
		attr.Credential = &syscall.Credential{}
	}
	cmd.SysProcAttr = attr
	network := e.lab.VM
	if e.container.Network != nil {
		network = e.container.Network
	}
	done := make(chan error)
	starts() <- func() { done <- network.Do(cmd.Start) }
	return cmd, <-done
}
