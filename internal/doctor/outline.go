package doctor

import (
	"maps"
	"slices"

	"github.com/service-proxy-agent/service-proxy-agent/internal/symptom"
)

// Unknown are checks that could not look, of one reason.
type Unknown struct {
	Why     string
	Sources []symptom.Source // that told nothing for this reason
	Checks  []symptom.ID
}

// Unknowns are all checks that could not look, by why: what an ordinary user may not see is one.
func (r Report) Unknowns() (all []Unknown) {
	sources := map[string][]symptom.Source{}
	for _, source := range slices.Sorted(maps.Keys(r.Unseen)) {
		sources[r.Unseen[source]] = append(sources[r.Unseen[source]], source)
	}
	needs := map[symptom.ID][]symptom.Source{}
	for _, k := range symptom.Kinds() {
		needs[k.ID] = k.Needs
	}
	index := map[string]int{}
	for _, check := range r.Checks {
		if check.State != symptom.Unknown {
			continue
		}
		why := check.Why
		for _, source := range needs[check.ID] {
			if reason, unseen := r.Unseen[source]; unseen {
				why = reason
				break
			}
		}
		at, known := index[why]
		if !known {
			at = len(all)
			index[why] = at
			all = append(all, Unknown{Why: why, Sources: sources[why]})
		}
		all[at].Checks = append(all[at].Checks, check.ID)
	}
	return all
}
