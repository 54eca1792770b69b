// Package identity says whose state it is that lies on a disk: this VM's, or that of the VM whose
// disk, snapshot or image this one was made from.
//
// Each file that is of a VM, and not of a disk, says whose it is (Owner). Three things tell one VM
// from another, each where the one before it does not:
//
//   - its instance id, which the metadata server tells, and which no other VM has or will have;
//   - the machine: /etc/machine-id, which a clone has too, and the firmware's asset tag, where
//     Compute Engine puts an UUID of the instance;
//   - the boot, where there is no such tag: what the same machine wrote in this boot was written
//     here. A clone of a disk has another one. (Containers side by side have the same.)
//
// The first start is often before the metadata server answers. What is not known to be ours by then
// is neither believed nor thrown away: whoever finds Unknown leaves the file as it is, and judges
// again when the id is known, which leaves nothing open. A VM whose metadata server is away after a
// plain reboot knows its own by the machine.
//
// It removes nothing: the daemon (agent) and bootstrap each do so with what they have written.
package identity

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/service-proxy-agent/service-proxy-agent/internal/untrusted"
)

// Owner is whose a file is, by its own word. The zero Owner is nobody's: of a prepared image, or of
// a version that did not say.
type Owner struct {
	Instance string `json:"instance,omitempty"` // the VM's id; "" where it was not known
	Machine  string `json:"machine,omitempty"`  // 32 hexadecimal digits; "" where nothing tells
	Boot     string `json:"boot,omitempty"`     // of the last write, 32 hexadecimal digits
}

// VM is this VM, as far as it is known. Instance is "" while the metadata server has not told it.
type VM struct {
	Owner
	// Tagged: the firmware's tag is a part of Machine, so that no clone has the same.
	Tagged bool
}

// Discarded is what was found of another VM, and discarded.
type Discarded struct {
	Instance string    `json:"instance,omitempty"` // the other VM's; "" where its state did not say
	This     string    `json:"this,omitempty"`
	What     []string  `json:"what"`
	At       time.Time `json:"at"` // UTC
}

// Verdict is whose state something is.
type Verdict int

// The verdicts, from the least that is known.
const (
	Unknown Verdict = iota // not to be believed, nor thrown away
	// Likely is ours by a sign that a clone may have, too: believed while no id is to be had.
	Likely
	Ours
	Others
)

// Believed says whether state is to be gone by.
func (v Verdict) Believed() bool { return v == Ours || v == Likely }

// Judge says whose o is. Once this VM's id is known the answer is Ours or Others.
func (vm VM) Judge(o Owner) Verdict {
	known := vm.Instance != ""
	// Where nothing has ever told of a machine, nothing tells against it either.
	same := o.Machine == vm.Machine && (o.Machine != "" || o.Instance == "" || o.Boot == vm.Boot)
	switch {
	case o == Owner{}:
		return Ours
	case known && o.Instance != "":
		if o.Instance == vm.Instance {
			return Ours
		}
		return Others
	case same && (known || vm.Tagged && o.Machine != "" || o.Boot != "" && o.Boot == vm.Boot):
		return Ours
	case same:
		return Likely
	case known: // nothing else will come to tell
		return Others
	}
	return Unknown
}

// Here is the VM that the program runs on, without its id. root is what all paths are beneath, ""
// for /.
func Here(root string) VM {
	const id, tag = "/etc/machine-id", "/sys/class/dmi/id/board_asset_tag"
	boot, _ := os.ReadFile(filepath.Join(root, "/proc/sys/kernel/random/boot_id"))
	return VM{
		Owner: Owner{
			// (product_uuid is as good as the tag, and root's alone.)
			Machine: sum(filepath.Join(root, id), filepath.Join(root, tag)),
			Boot:    Boot(string(boot)),
		},
		Tagged: sum(filepath.Join(root, tag)) != "",
	}
}

// Boot is a boot's id as an Owner has it: the kernel's own has dashes, systemd's has none.
func Boot(id string) string { return strings.ReplaceAll(strings.TrimSpace(id), "-", "") }

// sum stands for what the files hold, "" where none holds anything.
func sum(paths ...string) string {
	h, known := sha256.New(), false
	for _, path := range paths {
		text, err := os.ReadFile(path)
		text = bytes.TrimSpace(text)
		known = known || err == nil && len(text) > 0
		fmt.Fprintf(h, "%q\n", text)
	}
	if !known {
		return ""
	}
	return hex.EncodeToString(h.Sum(nil))[:32]
}

// mostOwner is more than the files of ReadAny ever have: 4 MB.
const mostOwner = 4 << 20

// Read reads whose the JSON file is; the zero Owner where it does not say, or cannot be read.
func Read(path string) (o Owner) {
	text, err := untrusted.ReadFile(path, mostOwner)
	if err != nil || json.Unmarshal(text, &o) != nil {
		return Owner{}
	}
	return o
}

// ReadAny reads whose the first of these files in dir is that says so: of what an earlier version
// has left, some say it, and all of it is of one VM.
func ReadAny(dir string, names ...string) (o Owner) {
	for _, name := range names {
		o = cmp.Or(o, Read(filepath.Join(dir, name)))
	}
	return o
}
