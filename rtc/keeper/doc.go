// Package keeper keeps timers alive in place of clients: as long as LiveKit says that a participant is connected, and no longer.
//
// A client hands over the timer of its leave event. That is a delegation. From then on the participant's connection to LiveKit is its sign
// of life. While it lasts, the timer is restarted. When it ends, the timer is ended, so that the room learns of it at once.
//
// # What it guarantees
//
//   - Durability. DelegateLeave and DelegateToken return after their change is committed. Start takes up what earlier processes accepted.
//   - No ghosts. A timer is restarted only within 30 seconds (fresh) after a sign of life: LiveKit said that the participant is there, or the
//     delegation was accepted. So the participant is out of the call, at the latest, the timer's delay and 30 seconds after that, even if
//     LiveKit and the homeserver die. While the homeserver is down nothing is sent; then it is at the latest 30 seconds after the next start.
//     The timer of a token has an exception: until its participant connects, it is restarted for an hour.
//   - Nobody is thrown out. While LiveKit and the engine answer, the timer of a connected participant neither ends nor runs out.
//     No answer is not "gone". An empty room is not "gone" either if LiveKit has lost it or made it anew, as after LiveKit's restart: it is
//     made again, and its participants have 20 seconds (grace) to come back.
//   - Gone is gone. That a participant is gone is written down before the timer ends. After that nothing restarts the timer, in no process.
//   - Webhooks are hints. Each only brings a look at LiveKit forward, or makes it more lenient. A lost, late, repeated or forged webhook
//     costs time at most.
//   - Who is not joined to the room of Matrix is removed from LiveKit, and each time that it comes again, for a week after it was last heard of. See
//     [Keeper.MemberLeft].
//
// A participant who crashes is noticed by LiveKit after 20 seconds. Its webhook brings a look at once, a second look after 250 ms confirms
// it, and then the timer ends.
//
// # States and transitions
//
// The row has waiting, connected or gone, and the SID of LiveKit's room. All else is in memory.
//
//	phase      LiveKit says                    looks                            the timer
//	waiting    never there                     after 1 s, growing, to 1 min     restarted when accepted; of a token, at half of its duration
//	connected  there                           every 15 s, or delay/4           restarted at half of the delay
//	missing    no longer there                 every second                     with a grace: restarted at half of its delay
//	silent     nothing                         after 1 s, growing, to 10 s      restarted once more
//	gone       no longer there, for good       none                             ends; a failure that passes is repeated
//	over       (forgotten)                     none                             is not ours
//
//	from                  when                                                   to         and then
//	(new)                 accepted; the row is written                           waiting    restart, look
//	(start)               the row says waiting                                   waiting    look; of a token, restart
//	(start)               the row says connected                                 connected  look
//	(start)               the row says gone                                      gone       end
//	waiting               there, as JOINED or ACTIVE                             connected  restart, note
//	waiting               not there, and min(1 h, delay) is over: a leave        gone       note, end
//	connected             there, whatever its session                            connected
//	connected             not there, the room has the SID that was noted         missing    until 250 ms later; 3 s without a webhook
//	connected             not there, otherwise                                   missing    until 20 s later; restart
//	connected, missing    no answer                                              silent     restart
//	silent                not there, or JOINING                                  missing    until 20 s later; restart
//	missing, silent       there, as JOINED or ACTIVE                             connected  restart, note
//	missing               not there, and the time is over                        gone       note, end
//	gone                  the engine has ended the timer                         over
//	all                   the engine says that the timer has ended               over       nothing is sent
//	all                   a newer delegation of the same member, or timer        over       the older event is cancelled
//
// Every restart in the table is left out if the last sign of life is more than 30 seconds old. What an earlier process saw does not count.
// The engine lets each delegated timer run for 30 seconds after a start at least, in which the first look comes.
//
// A missing participant has more time if a webhook says why: LiveKit was shut down, the client is told to connect anew, or a newer
// connection of the same identity came (returning, rejoinDoubt).
//
// A token's delegation that still waits after an hour is no longer kept alive, and the event expires by itself. A silent one whose timer runs
// out, and one that a client has ended itself, is over as soon as a step, or the check every five minutes, finds that out.
//
// # Concurrency
//
// [Keeper.Start] starts two goroutines: watch, which begins with whatever is due, and remove. Each look at a room, and each step of a
// delegation, has a goroutine of its own: 4 looks, 4 restarts or notes, and 8 ends at a time. One goroutine at a time looks at a room, and one
// works on a delegation. [Keeper.Stop] ends them all. A panic in any of them is a failure of that look or step, and ends nothing else.
//
// Locks are taken in this order, before those of package expiration:
//
//  1. Keeper.users, by user ID: one delegation of a user is accepted at a time.
//  2. Keeper.rows, by timer: one write of a delegation's row at a time, or one step.
//  3. Keeper.mu: all that is in memory. Neither the engine nor the store nor LiveKit is called while it is held. The suffix WithMu says that the
//     caller holds it.
package keeper
