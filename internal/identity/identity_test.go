package identity

import (
	"os"
	"path/filepath"
	"testing"
)

// TestJudge: whose a file is, as far as each of the three signs tells; once the VM's id is known
// nothing is left open.
func TestJudge(t *testing.T) {
	const a, b = "1", "2"
	of := func(instance, machine, boot string) Owner { return Owner{instance, machine, boot} }
	for _, tt := range []struct {
		name   string
		file   Owner
		vm     Owner
		tagged bool
		want   Verdict
	}{
		{"nobody's", of("", "", ""), of(a, "m", "x"), true, Ours},
		{"the same id", of(a, "m", "x"), of(a, "m", "x"), true, Ours},
		{"the same id on another machine in another boot", of(a, "m", "x"), of(a, "n", "y"), true, Ours},
		{"another id", of(a, "m", "x"), of(b, "n", "y"), true, Others},
		{"another id, and all else is the same", of(a, "m", "x"), of(b, "m", "x"), true, Others},
		{"restarted before the id is known", of(a, "m", "x"), of("", "m", "x"), false, Ours},
		{"a clone in a container beside", of(a, "m", "x"), of("", "n", "x"), false, Unknown},
		{"restarted where nothing tells the machine", of(a, "", "x"), of("", "", "x"), false, Ours},
		{"rebooted before the id is known", of(a, "m", "x"), of("", "m", "y"), true, Ours},
		{"rebooted, where a clone's machine would look the same", of(a, "m", "x"), of("", "m", "y"), false, Likely},
		{"a clone before the id is known", of(a, "m", "x"), of("", "n", "y"), true, Unknown},
		{"a clone that looks the same, before the id is known", of(a, "m", "x"), of("", "m", "y"), false, Likely},
		{"the id was not known then", of("", "m", "x"), of(a, "m", "y"), false, Ours},
		{"the id was not known then, on another machine", of("", "m", "x"), of(a, "n", "y"), true, Others},
		{"nothing tells the machine", of(a, "", "x"), of("", "", "y"), false, Unknown},
		{"nothing has ever told anything", of("", "", "x"), of("", "", "y"), false, Likely},
		{"nothing but the id now", of("", "", "x"), of(a, "", "y"), false, Ours},
		{"nothing told the machine then", of("", "", "x"), of("", "m", "y"), true, Unknown},
	} {
		vm := VM{tt.vm, tt.tagged}
		if have := vm.Judge(tt.file); have != tt.want {
			t.Errorf("%s: verdict %v, want %v", tt.name, have, tt.want)
		}
		vm.Instance = b
		if have := vm.Judge(tt.file); have != Ours && have != Others {
			t.Errorf("%s: with the id: verdict %v", tt.name, have)
		}
	}
	for v, want := range map[Verdict]bool{Unknown: false, Likely: true, Ours: true, Others: false} {
		if v.Believed() != want {
			t.Errorf("verdict %v is believed: %v", v, !want)
		}
	}
}

// TestHere: each of the files tells, the tag with a word of its own, and without any nothing does.
func TestHere(t *testing.T) {
	root := t.TempDir()
	put := func(name, text string) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if vm := Here(root); vm != (VM{}) {
		t.Errorf("nothing tells the machine, and it is %+v", vm)
	}
	seen := map[string]bool{}
	for _, step := range []struct {
		name, text string
		another    bool
	}{
		{"etc/machine-id", "1\n", true},
		{"etc/machine-id", "1", false}, // white space is none of it
		{"etc/machine-id", "2\n", true},
		{"sys/class/dmi/id/board_asset_tag", "\n", false},
		{"sys/class/dmi/id/board_asset_tag", "1\n", true},
		{"sys/class/dmi/id/board_asset_tag", "2\n", true},
	} {
		put(step.name, step.text)
		vm := Here(root)
		if len(vm.Machine) != 32 || seen[vm.Machine] == step.another {
			t.Errorf("%s %q: the machine is %q", step.name, step.text, vm.Machine)
		}
		seen[vm.Machine] = true
		if tagged := step.name != "etc/machine-id" && step.text != "\n"; vm.Tagged != tagged {
			t.Errorf("%s %q: tagged is %v", step.name, step.text, vm.Tagged)
		}
	}
	put("proc/sys/kernel/random/boot_id", "4d9f1c2e-0b1a-4c3d-8e5f-60718293a4b5\n")
	if have := Here(root).Boot; have != "4d9f1c2e0b1a4c3d8e5f60718293a4b5" || have != Boot(have) {
		t.Errorf("the boot is %q", have)
	}
}

// TestRead: a file says whose it is whatever else is in it. One that cannot be read is nobody's.
func TestRead(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"own": `{"text":"x","instance":"1","machine":"m","boot":"b"}`, "half": `{"instance":"1`, "other": `{"transitions":[]}`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("own", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]Owner{"own": {"1", "m", "b"}, "half": {}, "other": {},
		"absent": {}, "link": {}} {
		if have := Read(filepath.Join(dir, name)); have != want {
			t.Errorf("%s: %+v", name, have)
		}
	}
	if have := ReadAny(dir, "absent", "other", "own"); have.Instance != "1" {
		t.Errorf("%+v", have)
	}
}
