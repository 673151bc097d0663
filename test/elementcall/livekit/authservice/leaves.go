package main

import (
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"
)

// participant is one device in one call. Both fields are LiveKit's names.
type participant struct{ room, identity string }

// leave is a delayed leave event: its URL at the homeserver, and its delay.
type leave struct {
	url   string
	delay time.Duration
}

// leaves are the delayed leave events that clients have delegated to this service. A leave event is restarted while its participant is
// connected to LiveKit, and sent when the participant disconnects. If the participant never connects, the delay runs out.
type leaves struct {
	mu        sync.Mutex
	entrusted map[participant]leave
	connected map[participant]bool
}

func newLeaves() *leaves {
	return &leaves{entrusted: map[participant]leave{}, connected: map[participant]bool{}}
}

// entrust stores a leave event, and replaces an earlier one of the same participant.
func (l *leaves) entrust(p participant, event leave) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entrusted[p] = event
	go l.keepOff(p, event)
}

func (l *leaves) joined(p participant) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.connected[p] = true
}

// left sends the leave event of a participant that has disconnected.
func (l *leaves) left(p participant) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.connected, p)
	if event, ok := l.entrusted[p]; ok {
		delete(l.entrusted, p)
		go event.do("send")
	}
}

// keepOff restarts a leave event at once, and then repeatedly, before its delay is over. It stops when the participant disconnects or
// delegates another event.
func (l *leaves) keepOff(p participant, event leave) {
	for event.do("restart") {
		time.Sleep(event.delay * 4 / 5)
		l.mu.Lock()
		goOn := l.connected[p] && l.entrusted[p] == event
		l.mu.Unlock()
		if !goOn {
			return
		}
	}
}

// do performs an action on a delayed event, and reports whether it succeeded. The delay ID is the only credential.
func (e leave) do(action string) bool {
	res, err := http.Post(e.url+"/"+action, "application/json", strings.NewReader("{}"))
	if err != nil {
		slog.Error("the homeserver is out of reach", "err", err)
		return false
	}
	defer res.Body.Close()
	slog.Info("delayed leave", "action", action, "status", res.Status)
	return res.StatusCode == http.StatusOK
}
