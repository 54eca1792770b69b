package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"go.uber.org/zap"

	"github.com/service-proxy-agent/service-proxy-agent/internal/server"
)

// markName is the file in the runtime folder that says which rules a start may adopt: an agent of this boot put jumps in,
// and had seen the ports ready that they lead to. It holds the boot's id. Rules without it were restored by something
// else at boot (netfilter-persistent, a snapshot of the VM) before Envoy could accept anything.
const markName = "intercepting"

// bootID is the kernel's random id of this boot (random(4)), "" where /proc does not tell.
func bootID() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(id))
}

// isMarked says whether an agent of this boot put jumps in.
func isMarked(dir string) bool {
	id, err := os.ReadFile(filepath.Join(dir, markName))
	return err == nil && strings.TrimSpace(string(id)) == bootID()
}

// mark says that the jumps are about to go in.
func (a *Agent) mark() {
	if a.marked {
		return
	}
	a.marked = true // the folder is a tmpfs: what fails once fails again
	if err := os.WriteFile(filepath.Join(server.Dir(), markName), []byte(bootID()+"\n"), 0o600); err != nil {
		a.log.Warn("a restart while Envoy is away will take the jumps out", zap.Error(err))
	}
}

// Unmark takes the mark away. Call it when the rules were taken out: what is there later was put there by somebody else.
func Unmark() error {
	if err := os.Remove(filepath.Join(server.Dir(), markName)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget that the rules are ours: %w", err)
	}
	return nil
}
