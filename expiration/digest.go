package expiration

import (
	"crypto/sha256"
	"encoding/binary"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
)

// Digest holds what memory keeps of a timer and what never changes: the first bytes of its token's hash, hashes of names, and when its
// event was accepted. It is stored, so that the start does not have to read names.
type Digest [digestSize]byte

// The offsets in a Digest. Each field is a number of eight bytes, except for the token and the last field. The first field identifies the
// key of the hashes: hashes under another key are useless.
const (
	digestKey      = 0
	digestToken    = 8
	digestRoom     = digestToken + index.TokenSize
	digestSender   = digestRoom + 8
	digestState    = digestSender + 8
	digestRequest  = digestState + 8
	digestReceived = digestRequest + 8 // in milliseconds since 1970
	digestKind     = digestReceived + 8
	digestSize     = digestKind + 1
)

func (d *Digest) get(at int) uint64 { return binary.BigEndian.Uint64(d[at:]) }

func (d *Digest) kind() index.Kind { return index.Kind(d[digestKind]) }

func (d *Digest) set(at int, n uint64) { binary.BigEndian.PutUint64(d[at:], n) }

// Indexed is what the start reads of a row.
type Indexed struct {
	NID    int64
	Digest Digest // zero if the row has none
	// Claimed says that the row is claimed, so the timer no longer runs.
	Claimed bool
	// Kept says that the timer has a delegation.
	Kept     bool
	Duration time.Duration
	Deadline time.Time
}

// row converts it to what the index keeps.
func (i Indexed) row() index.Row {
	return index.Row{
		NID: i.NID, Token: [index.TokenSize]byte(i.Digest[digestToken:]),
		Room: i.Digest.get(digestRoom), Sender: i.Digest.get(digestSender),
		State: i.Digest.get(digestState), Request: i.Digest.get(digestRequest),
		Received: int64(i.Digest.get(digestReceived)), Kind: i.Digest.kind(), Claimed: i.Claimed,
		Duration: i.Duration, Deadline: i.Deadline.UnixMilli(),
	}
}

// newIndexed returns what a start would read of a row without a delegation.
func newIndexed(row Timer, d Digest) Indexed {
	return Indexed{NID: row.NID, Digest: d, Claimed: row.Claim != nil, Duration: row.Duration, Deadline: row.Deadline}
}

// names hashes names to numbers under a secret key. Without the key nobody can construct two names with one number, and accidental
// collisions are negligible.
type names struct {
	key []byte
}

// hash returns the number of a name. It is never 0.
func (n names) hash(parts ...string) uint64 {
	data := append(make([]byte, 0, 512), n.key...)
	for _, part := range parts {
		data = append(append(data, part...), 0xff) // this byte never occurs in UTF-8
	}
	sum := sha256.Sum256(data)
	return max(binary.BigEndian.Uint64(sum[:]), 1)
}

// state returns the number of a piece of state.
func (n names) state(s StateKey) uint64 { return n.hash(s.RoomID, s.Type, s.Key) }

// request returns the number of a request.
func (n names) request(h RequestHash) uint64 { return n.hash(string(h[:])) }

// id returns a number that identifies the key itself.
func (n names) id() uint64 { return n.hash() }

// digest returns the digest of a row.
func (n names) digest(row Timer) (d Digest) {
	d.set(digestKey, n.id())
	copy(d[digestToken:], row.TokenHash[:index.TokenSize])
	d.set(digestRoom, n.hash(row.Event.RoomID))
	d.set(digestSender, n.hash(row.Event.Sender))
	if state, ok := row.Event.State(); ok {
		d.set(digestState, n.state(state))
	}
	d.set(digestReceived, uint64(row.Received.UnixMilli()))
	switch {
	case row.Delayed != nil: // the database finds these by their request
		d[digestKind] = byte(index.Delayed)
		if row.Delayed.Service {
			d[digestKind] = byte(index.ServiceDelayed)
		}
	case row.Event.Request != nil:
		d.set(digestRequest, n.request(row.Event.Request.Hash))
	}
	return d
}
