package envoyadmin

import "slices"

// looks is of what the next look is: of the listeners of the last full dump by their names, which
// is cheaper, or of all. The zero value has no names.
type looks struct {
	asking Action   // the look that Next asked for last
	names  []string // of the last full dump, sorted, if it may be looked at by them
	named  int      // looks by names since the last of all
	all    bool     // the next is to be of all: a listener is gone
	unlike uint64   // of this process looks by names differ although nothing moved; 0: of none
}

// next is the next look at this process; stranger: for a listener of another name.
func (l *looks) next(process uint64, stranger bool) Action {
	if len(l.names) == 0 || l.all || stranger || l.named >= namedLooks ||
		l.unlike != 0 && l.unlike == process {
		return Look
	}
	return LookNamed
}

// answered takes in that the last one was.
func (l *looks) answered() {
	if l.asking == LookNamed {
		l.named++
	} else {
		l.named, l.all = 0, false
	}
}

// dumped takes in the names of a full dump, sorted.
func (l *looks) dumped(names []string) {
	l.all = l.all || slices.ContainsFunc(l.names, func(name string) bool {
		_, found := slices.BinarySearch(names, name)
		return !found
	})
	l.names = nil
	if Nameable(names) {
		l.names = names
	}
}
