package symptom

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

// hostile is what others may have written, in names and in words. Whoever lets a shell run the part
// that is a command sees PWNED.
var hostile = []string{
	"'; printf %s%s PW NED; '", "$(printf %s%s PW NED)", "`printf %s%s PW NED`", "; printf %s%s PW NED #",
	"\" && printf %s%s PW NED && \"", "\nprintf %s%s PW NED\n", "--flag; printf %s%s PW NED",
	"\x1b[2J\x1b]0;title\a", "<script>alert(1)</script>", "| [x](javascript:0) |", "\u202egnp.exe\u200b",
	"\xff\xfe\x00", "%s%d%!n", strings.Repeat("A", 1<<20), strings.Repeat("ü\n", 1<<12),
}

// spoil puts text into every string and error of v that is there, or in place of the names that
// examples have.
func spoil(v reflect.Value, text string) {
	in := func(s string) string {
		spoiled := s
		for _, name := range []string{"123456789012", "default", "15001", "/var/log/envoy.log"} {
			spoiled = strings.ReplaceAll(spoiled, name, text)
		}
		if spoiled == s {
			spoiled = s + text
		}
		return spoiled
	}
	switch v.Kind() {
	case reflect.String:
		if v.Len() > 0 {
			v.SetString(in(v.String()))
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Type().Field(i).IsExported() {
				spoil(v.Field(i), text)
			}
		}
	case reflect.Slice:
		for i := range v.Len() {
			spoil(v.Index(i), text)
		}
	case reflect.Pointer:
		if !v.IsNil() {
			spoil(v.Elem(), text)
		}
	case reflect.Interface:
		if err, ok := v.Interface().(error); ok {
			v.Set(reflect.ValueOf(fmt.Errorf("%w%s", err, text)))
		}
	}
}

// copied is f with slices and pointers of its own.
func copied(f Facts) Facts {
	var deep func(reflect.Value)
	deep = func(v reflect.Value) {
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				if v.Type().Field(i).IsExported() {
					deep(v.Field(i))
				}
			}
		case reflect.Slice:
			if v.Len() > 0 {
				v.Set(reflect.AppendSlice(reflect.MakeSlice(v.Type(), 0, v.Len()), v))
			}
			for i := range v.Len() {
				deep(v.Index(i))
			}
		case reflect.Pointer:
			if !v.IsNil() {
				one := reflect.New(v.Type().Elem())
				one.Elem().Set(v.Elem())
				v.Set(one)
				deep(one.Elem())
			}
		}
	}
	deep(reflect.ValueOf(&f).Elem())
	return f
}

func shown(s string, limit int) bool {
	return len(s) <= limit && utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool {
		return !unicode.IsPrint(r)
	})
}

// TestHostile: whatever others have written, the finding is the same, in printable words of a
// bounded length, and its commands run nothing of it.
func TestHostile(t *testing.T) {
	t.Parallel()
	var script []string
	for i, text := range hostile {
		for _, e := range examples {
			f := copied(e.facts)
			spoil(reflect.ValueOf(&f).Elem(), text)
			findings := Check(f)
			if e.want != "" && !slices.ContainsFunc(findings, func(f Finding) bool {
				// The scope's name is no more among the scopes, and a quote ends the file's name.
				return f.ID == e.want || f.ID == ScopeMissing || f.ID == ListenerRejected
			}) {
				t.Errorf("%s, %d: not found: %.300q", e.when, i, fmt.Sprint(findings))
			}
			for _, found := range findings {
				if !shown(found.Text(), maxCause+len("; ")+maxNext) || !shown(found.Key, maxKey) ||
					len(found.Evidence) > maxPieces || len(found.Commands) > maxPieces {
					t.Errorf("%s, %d: %s: %q", e.when, i, found.ID, found.Text())
				}
				for _, seen := range found.Evidence {
					if !shown(seen.Text, maxEvidence) {
						t.Errorf("%s, %d: %s: evidence %q", e.when, i, found.ID, seen.Text)
					}
				}
				for _, command := range found.Commands {
					if !shown(command, 1000) {
						t.Errorf("%s, %d: %s: command %q", e.when, i, found.ID, command)
					}
				}
				script = append(script, found.Commands...)
			}
		}
	}
	runNothing(t, script)
}

// runNothing has a real shell run the commands where no program is to be found.
func runNothing(t *testing.T, commands []string) {
	slices.Sort(commands)
	commands = slices.Compact(commands)
	dir := t.TempDir()
	file := filepath.Join(dir, "script")
	if err := os.WriteFile(file, []byte(strings.Join(commands, "\n")+"\nprintf 'the %s' end\n"),
		0o600); err != nil {
		t.Fatal(err)
	}
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	run := exec.Command(sh, file)
	run.Dir, run.Env = dir, []string{"PATH=/nonexistent"}
	var stderr strings.Builder
	run.Stderr = &stderr
	out, err := run.Output()
	if err != nil || !strings.HasSuffix(string(out), "the end") || strings.Contains(string(out), "PWNED") ||
		strings.Contains(stderr.String(), "yntax") {
		t.Errorf("sh: %v: %.2000q %.2000q", err, out, stderr.String())
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 2 { // the script, and FILE
		t.Errorf("files were written: %v %v", entries, err)
	}
	if len(commands) < 300 {
		t.Errorf("only %d commands", len(commands))
	}
}

// TestHostileSeen: the test above sees a command that takes a name as it is.
func TestHostileSeen(t *testing.T) {
	for _, text := range hostile[:6] {
		out, _ := exec.Command("sh", "-c", "printf %s "+text).CombinedOutput()
		quoted, _ := exec.Command("sh", "-c", "printf %s \""+text+"\"").CombinedOutput()
		single, _ := exec.Command("sh", "-c", "printf %s '"+text+"'").CombinedOutput()
		if !strings.Contains(string(out)+string(quoted)+string(single), "PWNED") {
			t.Errorf("%q runs nothing: %q %q %q", text, out, quoted, single)
		}
	}
}

// TestBounded: hundreds of a thing are a handful of findings, whose keys do not tell how many.
func TestBounded(t *testing.T) {
	many := func(n int) Facts {
		return live(func(f *Facts) {
			f.Clusters = append(manyClusters(n, 1), manyClusters(n, 4)...)
			f.Old = make([]OldConnection, n)
			for i := range n {
				port := uint16(1000 + i)
				f.Silent = append(f.Silent, port)
				f.Dropped = append(f.Dropped, Dropped{Port: port, At: port, Chain: "INPUT"},
					Dropped{Family: 1, Port: port, At: 15006, Chain: "INPUT", Rule: "-j DROP"})
			}
		})
	}
	keys := func(f Facts) (all []string) {
		for _, found := range Check(f) {
			all = append(all, string(found.ID)+" "+found.Key)
		}
		return all
	}
	if have := keys(many(400)); len(have) > 16 || !slices.Equal(have, keys(many(300))) {
		t.Errorf("%q, and with fewer %q", have, keys(many(300)))
	}
	for n := range 12 {
		have := keys(many(n))
		slices.Sort(have)
		if len(slices.Compact(slices.Clone(have))) != len(have) {
			t.Errorf("%d: %q", n, have)
		}
	}
}

// TestKeys: two keys stay two, and one stays the same.
func TestKeys(t *testing.T) {
	long := strings.Repeat("x", 1<<20)
	seen := map[string]string{}
	for _, key := range []string{"", "a", "a b", long, long + "y", "y" + long, "a\n", "a\t", "\x1b", "\x1c"} {
		f, g := Finding{Key: key}, Finding{Key: key}
		tidy(&f)
		tidy(&g)
		if other, twice := seen[f.Key]; twice || f.Key != g.Key || !shown(f.Key, maxKey) {
			t.Errorf("%.20q: %q, and of %.20q", key, f.Key, other)
		}
		seen[f.Key] = key
	}
	for _, plain := range []string{"127.0.0.1:15001", "IPv6", "front 10.0.0.0/8"} {
		f := Finding{Key: plain}
		if tidy(&f); f.Key != plain {
			t.Errorf("%q became %q", plain, f.Key)
		}
	}
}

func FuzzPrintable(f *testing.F) {
	for _, s := range append(hostile, "a", " a  b ", "…", strings.Repeat("…", 100)) {
		f.Add(s, 20)
	}
	f.Fuzz(func(t *testing.T, s string, limit int) {
		limit = 4 + int(uint(limit)%1000)
		got := Printable(s, limit)
		if !shown(got, limit) || Printable(got, limit) != got {
			t.Errorf("%q of %q", got, s)
		}
		if shown(s, limit) && strings.Join(strings.Fields(s), " ") == s && got != s {
			t.Errorf("%q was fit, and became %q", s, got)
		}
		if w := word(s, "X"); w != "X" && !shown(w, 1000) {
			t.Errorf("%q is a word %q", s, w)
		}
	})
}
