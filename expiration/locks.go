package expiration

import (
	"context"
	"sync"
)

// keyedLocks is a lock for each key that is in use just now, and no memory for any other. Waiting for one obeys a
// context, which a sync.Mutex cannot.
type keyedLocks[K comparable] struct {
	mu    sync.Mutex // guards the others, and the users of each lock; a leaf, see the lock order in doc.go
	locks map[K]*keyedLock
	spare []*keyedLock // some that were forgotten, to be used again: each refresh needs one
}

// maxSpare is how many locks are kept for later.
const maxSpare = 64

type keyedLock struct {
	users int           // holders and waiters; the lock is forgotten at 0
	held  chan struct{} // of capacity 1; full while somebody holds the lock
}

func newKeyedLocks[K comparable]() *keyedLocks[K] {
	return &keyedLocks[K]{locks: map[K]*keyedLock{}}
}

// lock waits for the lock of key and returns the function that gives it back.
func (l *keyedLocks[K]) lock(ctx context.Context, key K) (func(), error) {
	l.mu.Lock()
	lock := l.locks[key]
	if lock == nil {
		if last := len(l.spare) - 1; last >= 0 {
			lock, l.spare = l.spare[last], l.spare[:last]
		} else {
			lock = &keyedLock{held: make(chan struct{}, 1)}
		}
		l.locks[key] = lock
	}
	lock.users++
	l.mu.Unlock()

	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if lock.users--; lock.users == 0 {
			delete(l.locks, key)
			if len(l.spare) < maxSpare {
				l.spare = append(l.spare, lock)
			}
		}
	}
	select {
	case lock.held <- struct{}{}:
		return func() { <-lock.held; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}
