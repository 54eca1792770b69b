package terminal

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// Columns is how wide a text is on a terminal: a colour is not, nor what joins the rune before it,
// and most of what East Asia writes takes two.
func Columns(text string) (n int) {
	for text != "" {
		if after, ok := strings.CutPrefix(text, "\x1b["); ok {
			if end := strings.IndexByte(after, 'm'); end >= 0 {
				text = after[end+1:]
				continue
			}
		}
		r, size := utf8.DecodeRuneInString(text)
		text = text[size:]
		n += columnsOf(r)
	}
	return n
}

// Cut is a text without colour in at most width columns; what is cut ends in "…".
func Cut(text string, width int) string {
	if Columns(text) <= width {
		return text
	}
	first, _ := split(text, width-1)
	return first + "…"
}

// split cuts a text after so many columns, and after a rune at least.
func split(text string, columns int) (first, others string) {
	for i, r := range text {
		columns -= columnsOf(r)
		if columns < 0 && i > 0 {
			return text[:i], text[i:]
		}
	}
	return text, ""
}

// wide are the blocks of runes that take two columns, as the wcwidth of Markus Kuhn has them
// (https://www.cl.cam.ac.uk/~mgk25/ucs/wcwidth.c), and emoji.
var wide = &unicode.RangeTable{
	R16: []unicode.Range16{{Lo: 0x1100, Hi: 0x115f, Stride: 1}, {Lo: 0x2329, Hi: 0x232a, Stride: 1},
		{Lo: 0x2e80, Hi: 0x303e, Stride: 1}, {Lo: 0x3040, Hi: 0xa4cf, Stride: 1},
		{Lo: 0xac00, Hi: 0xd7a3, Stride: 1}, {Lo: 0xf900, Hi: 0xfaff, Stride: 1},
		{Lo: 0xfe30, Hi: 0xfe6f, Stride: 1}, {Lo: 0xff00, Hi: 0xff60, Stride: 1},
		{Lo: 0xffe0, Hi: 0xffe6, Stride: 1}},
	R32: []unicode.Range32{{Lo: 0x1f300, Hi: 0x1faff, Stride: 1},
		{Lo: 0x20000, Hi: 0x3fffd, Stride: 1}},
}

func columnsOf(r rune) int {
	switch {
	case r < 0x300:
		return 1
	case unicode.In(r, unicode.Mn, unicode.Me, unicode.Cf):
		return 0
	case unicode.Is(wide, r):
		return 2
	}
	return 1
}
