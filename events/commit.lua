-- One commit: all of it or nothing.
--
-- Every check comes before the first write, and the first write is the append: a Lua error keeps the writes made
-- before it, so nothing after the append may be able to fail (SET and DEL cannot, RPUSH follows a DEL, and the
-- types of the other streams were looked at). Out of memory and lost replicas are refused at the first write.
--
-- KEYS: event stream, emergency brake, one a requirement, one a write, one a stream to acknowledge on
-- ARGV: expected seq, expected hash, until when it may grant permits (server time in us; 0: it grants none), counts of
--   requirements, entries, writes, acknowledgements, then
--   requirement: present (0|1)
--   entry:       event, seq, timestamp, data, hash, number of further strings, further field, its value …
--   write:       set, ttl in ms (0: none), value | del | list, ttl, number of values, value …
--   acknowledge: group, number of ids, id …
-- Text that is a number becomes one by adding to it: `tonumber` is a call more.
local KEYS, ARGV, call = KEYS, ARGV, redis.call
local at = 7
-- With the next so many arguments; unpack fails on some thousands.
local function push_many(count, name)
  local last = at + count
  for from = at + 1, last, 1000 do call('RPUSH', name, unpack(ARGV, from, math.min(from + 999, last))) end
  at = last
end
local function acknowledge_many(count, name, group)
  local last = at + count
  for from = at + 1, last, 1000 do call('XACK', name, group, unpack(ARGV, from, math.min(from + 999, last))) end
  at = last
end

local events, halt = KEYS[1], KEYS[2]
local expected_seq, expected_hash, grants = ARGV[1], ARGV[2], ARGV[3]
local requirements, entries, writes, acknowledgements =
  ARGV[4] + 0, ARGV[5] + 0, ARGV[6] + 0, ARGV[7] + 0

local seq, hash
local last = call('XREVRANGE', events, '+', '-', 'COUNT', 1)[1]
if last then
  local fields = last[2]
  for i = 1, #fields, 2 do
    local field = fields[i]
    if field == 'seq' then seq = fields[i + 1] elseif field == 'hash' then hash = fields[i + 1] end
  end
end
seq, hash = seq or '0', hash or string.rep('0', 64)
if seq ~= expected_seq or hash ~= expected_hash then return {'CONFLICT', seq, hash} end

for i = 1, requirements do
  if call('EXISTS', KEYS[2 + i]) ~= ARGV[at + i] + 0 then return {'REQUIREMENT', tostring(i - 1), ''} end
end
at = at + requirements
if grants ~= '0' then
  -- A commit can lie in a frozen connection; a permit must not outlive the data it was decided on.
  local time = call('TIME')
  if time[1] * 1000000 + time[2] > grants + 0 then return {'LATE', '', ''} end
  if call('EXISTS', halt) == 1 then
    return {'HALTED', call('TYPE', halt).ok == 'string' and call('GET', halt) or '', ''}
  end
end
local streams = 2 + requirements + writes
for i = 1, acknowledgements do
  local name = KEYS[streams + i]
  local kind = call('TYPE', name).ok
  if kind ~= 'stream' and kind ~= 'none' then
    return redis.error_reply('WRONGTYPE ' .. name .. ' is a ' .. kind .. ', expected a stream')
  end
end

for _ = 1, entries do
  local event, number, timestamp, data, digest = ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], ARGV[at + 5]
  local further = ARGV[at + 6]
  at = at + 6
  if further == '0' then
    call('XADD', events, number .. '-0', 'event', event, 'seq', number, 'timestamp', timestamp, 'data', data, 'hash', digest)
  else
    at = at + further
    call('XADD', events, number .. '-0', 'event', event, 'seq', number, 'timestamp', timestamp, 'data', data, 'hash', digest,
      unpack(ARGV, at - further + 1, at))
  end
end
local gone = {'OK'}
for i = 1, writes do
  local name, op, ttl = KEYS[2 + requirements + i], ARGV[at + 1], ARGV[at + 2]
  if op == 'set' then
    if ttl == '0' then call('SET', name, ARGV[at + 3]) else call('SET', name, ARGV[at + 3], 'PX', ttl) end
    at = at + 3
  elseif op == 'del' then
    if call('DEL', name) == 0 then gone[#gone + 1] = i - 1 end
    at = at + 1
  else
    local count = ARGV[at + 3] + 0
    at = at + 3
    call('DEL', name)
    if count > 0 then
      push_many(count, name)
      if ttl ~= '0' then call('PEXPIRE', name, ttl) end
    end
  end
end
for i = 1, acknowledgements do
  local group, count = ARGV[at + 1], ARGV[at + 2] + 0
  at = at + 2
  acknowledge_many(count, KEYS[streams + i], group)
end
return gone
