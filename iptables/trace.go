package iptables

// Did is what a rule that matched did with the packet.
type Did string

const (
	WentOn     Did = "goes on"   // it only counts, logs or marks
	Jumped     Did = "jumps"     // to another chain, or goes there
	Returned   Did = "returns"   // to the chain it came from; in a built-in one: is done
	Accepted   Did = "accepts"   // the packet goes its own way
	Redirected Did = "redirects" // a rule of ours
	Took       Did = "takes"     // another program's rule decides
	NotKnown   Did = "not known" // a target that this package does not know
	NotRead    Did = "not read"  // no rule: the chain is not known, or leads in a circle
	Ended      Did = "ends"      // no rule: the end of the chain, where none more matched
)

// Step is a rule that matched on a packet's way, or the end of a chain that it came to.
type Step struct {
	Chain   string
	Index   int    // in the chain, from 1, as -L --line-numbers has it; 0: no rule, see Did
	Rule    string // in iptables-save's form without "-A CHAIN"
	Comment string
	Target  string // "" for a rule that only counts
	Did     Did
	Perhaps bool // whether it matches depends on a match that this package does not know
	// Passed is how many rules of the chain did not match since the step before in it.
	Passed int
}

// Trace is Walk with the way there: what matched, in order. The walk is the same one, so that the
// two cannot disagree.
func (t Table) Trace(p Packet) ([]Step, Verdict) {
	var steps []Step
	verdict := t.walker(p, func(s Step) {
		if len(steps) < maxSteps {
			steps = append(steps, s)
		}
	}).start()
	return steps, verdict
}

// maxSteps bounds a trace through a table of others' that leads in circles.
const maxSteps = 1000

// IsOurs says whether a chain is one of ours by its name.
func IsOurs(chain string) bool { return isOurs(chain) }
