package symptom

import (
	"crypto/sha1"
	"encoding/hex"
)

// namespace is that of the message IDs: a random UUID. It never changes, as no ID of a symptom
// does, so that what was searched for, or kept in a filter, is still found after an upgrade.
var namespace = [16]byte{
	0xad, 0x06, 0x20, 0x6a, 0xff, 0x9b, 0x42, 0x8f,
	0xab, 0x19, 0xc9, 0x4f, 0x2e, 0x98, 0xc1, 0x16,
}

// Over is what names, instead of a symptom, the event that one is over.
const Over ID = "over"

// MessageID is the journal's MESSAGE_ID of the events of this symptom, in the form that journalctl
// and the journal's catalog take: 32 lower case hexadecimal digits. It is a UUID of version 5
// (RFC 9562), of the ID's name; of any name, so that nobody has to look whether it is known.
func (id ID) MessageID() string {
	h := sha1.New()
	h.Write(namespace[:])
	h.Write([]byte(id))
	sum := h.Sum(nil)[:16]
	sum[6] = sum[6]&0x0f | 0x50 // version 5
	sum[8] = sum[8]&0x3f | 0x80 // variant of RFC 9562
	return hex.EncodeToString(sum)
}
