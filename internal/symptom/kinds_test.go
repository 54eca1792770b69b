package symptom

import (
	"slices"
	"strings"
	"testing"
)

// TestKinds: every ID of this package is a kind, once, with a title and its severities.
func TestKinds(t *testing.T) {
	ids := map[ID]bool{}
	for _, id := range constants(t) {
		ids[id] = true
	}
	if len(ids) < 30 {
		t.Fatalf("only %d IDs in symptom.go", len(ids))
	}
	for _, k := range Kinds() {
		if !ids[k.ID] {
			t.Errorf("%s is twice, or no ID", k.ID)
		}
		delete(ids, k.ID)
		if k.Title == "" || strings.HasSuffix(k.Title, ".") || len(k.Severities) == 0 ||
			!slices.IsSortedFunc(k.Severities, func(a, b Severity) int { return int(b - a) }) {
			t.Errorf("%+v", k)
		}
	}
	for id := range ids {
		t.Errorf("%s has no kind", id)
	}
}

// isKind fails unless Kinds knows of such a finding.
func isKind(t *testing.T, f Finding) {
	t.Helper()
	i := slices.IndexFunc(Kinds(), func(k Kind) bool { return k.ID == f.ID })
	if i < 0 || !slices.Contains(Kinds()[i].Severities, f.Severity) {
		t.Errorf("no kind %s of severity %v", f.ID, f.Severity)
	}
}
