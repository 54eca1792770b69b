// Package exitcode has the exit codes of the commands, so that each means one thing wherever it is
// used. What it means of one command, the command's help says.
package exitcode

// The codes.
const (
	Yes      = 0
	No       = 1
	NotKnown = 2
	Usage    = 64 // EX_USAGE of sysexits.h
)

// Meanings are all of them, in words that hold for every command.
var Meanings = []struct {
	Code    int
	Meaning string
}{
	{Yes, "yes, or done"},
	{No, "no, or an error"},
	{NotKnown, "could not look, or no answer"},
	{Usage, "wrong usage"},
}
