package symptom

import (
	"encoding/json"
	"testing"

	"github.com/service-proxy-agent/service-proxy-agent/internal/recording"
)

// TestRecordedFacts: facts that were written and read again give the same answers, for each kind.
func TestRecordedFacts(t *testing.T) {
	for _, e := range examples {
		t.Run(e.when, func(t *testing.T) { sameWhenRecorded(t, e.facts) })
	}
	everything := make([]Facts, 0, len(examples))
	for _, e := range examples {
		everything = append(everything, e.facts)
	}
	sameWhenRecorded(t, together(everything...))
	// Nil is not the same as none.
	denied := stream(7, "Request had insufficient authentication scopes.")
	for _, scopes := range [][]string{nil, {}} {
		denied.Scopes = scopes
		sameWhenRecorded(t, denied)
	}
}

func sameWhenRecorded(t *testing.T, f Facts) {
	t.Helper()
	data, err := recording.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	var again Facts
	if err := recording.Unmarshal(data, &again); err != nil {
		t.Fatalf("%v\n%s", err, data)
	}
	if got, want := answered(t, again), answered(t, f); got != want {
		t.Errorf("replayed:\n%s\nwant:\n%s", got, want)
	}
}

func answered(t *testing.T, f Facts) string {
	t.Helper()
	text, err := json.MarshalIndent(Examine(f), "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
